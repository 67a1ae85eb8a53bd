"""How weights get on a grid of few values."""
