"""The HTTP service: it asks, workers do."""
