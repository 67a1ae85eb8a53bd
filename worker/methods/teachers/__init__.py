"""Who the student learns from."""
