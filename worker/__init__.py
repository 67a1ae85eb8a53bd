"""What does the work: Celery outside, torch inside a child process."""
