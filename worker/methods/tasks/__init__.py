"""What a model is to do."""
