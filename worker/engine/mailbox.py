"""What the supervisor has answered and the stage has not read yet."""

import threading
from typing import Any


class Mailbox:
    """Answers, as the thread that reads orders puts them in and the stage takes them out."""

    def __init__(self) -> None:
        self._orders: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def put(self, order: dict[str, Any]) -> None:
        """Adds an answer."""
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """Returns all that came, after waiting for the first for at most so long."""
        with self._changed:
            if not self._orders:
                self._changed.wait(timeout_s)
            orders, self._orders = self._orders, []
        return orders
