"""Health, readiness and metrics of the service itself."""
