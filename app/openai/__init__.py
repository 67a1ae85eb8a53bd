"""The fine-tuning API of OpenAI, as its own client speaks it."""
