"""The methods that a job spec can name."""
