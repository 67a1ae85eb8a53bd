"""The protocol of the Hugging Face Hub."""
