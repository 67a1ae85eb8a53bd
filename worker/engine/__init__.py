"""The inside of a stage: everything that computes."""
