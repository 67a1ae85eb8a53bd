"""What the API and the worker agree on. Never imports torch, never fastapi."""
