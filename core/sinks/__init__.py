"""The forms in which others are told of jobs; one file is one form."""
