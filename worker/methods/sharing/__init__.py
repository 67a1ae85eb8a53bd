"""Weights that several models or tasks share, and what each has of its own beside them."""
