"""Deployable forms of the student."""
