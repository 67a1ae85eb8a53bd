"""Where the student's architecture and first weights come from."""
