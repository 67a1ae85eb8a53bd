"""Stored secrets."""
