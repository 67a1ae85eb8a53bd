"""Stillhouse for its users: the HTTP client, the command line, and the whole stack on one machine."""
