"""Stillhouse for its users: the HTTP client, the command line, and the whole stack on one machine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    """Returns the client's names on first use, so that the stack's own processes need not load it."""
    if name == "Client":
        from stillhouse.client import Client

        return Client
    raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")
