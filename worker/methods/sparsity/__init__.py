"""Which single weights of a matrix become zero."""
