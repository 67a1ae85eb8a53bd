"""Jobs: submit, follow, cancel, download."""
