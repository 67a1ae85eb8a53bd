"""Data sets: upload, list, preview, delete."""
