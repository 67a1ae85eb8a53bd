"""The shop window: one file is one method."""
