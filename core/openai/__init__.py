"""What the door for OpenAI's clients keeps beside jobs and data sets."""
