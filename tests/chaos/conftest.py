"""The stack of the end-to-end tests, for the long runs."""

from tests.e2e.conftest import pico_files, stack

__all__ = ["pico_files", "stack"]
