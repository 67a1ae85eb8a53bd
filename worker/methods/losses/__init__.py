"""Terms of the training objective."""
