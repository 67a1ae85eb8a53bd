"""Models: upload, list, download, delete."""
