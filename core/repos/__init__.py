"""What was committed to models and data sets, file by file."""
