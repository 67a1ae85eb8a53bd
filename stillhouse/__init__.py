"""Stillhouse for its users: the HTTP clients, the command line, and the whole stack on one machine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Returns the clients on first use, so that the stack's own processes need not load them."""
    if name in __all__:
        from stillhouse import client

        return getattr(client, name)
    raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")
