"""Telling others what happened to jobs."""
