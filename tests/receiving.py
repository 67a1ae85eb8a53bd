"""An endpoint for webhooks, on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import func, text, update
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from core.db import session_scope
from core.settings import get_settings
from core.tenants import secrets
from core.webhooks import guard
from core.webhooks.models import Delivery
from core.webhooks.sending import send_due
from tests.serving import served


class Receiver:
    """An endpoint that answers as it is told to, and remembers all that came."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Response] = []
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.app = Starlette(routes=[Route("/hook", self.take, methods=["POST"])])

    async def take(self, request: Request) -> Response:
        self.seen.append((dict(request.headers), await request.body()))
        return self.answers.pop(0) if self.answers else PlainTextResponse("thanks")


@contextmanager
def receiving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Yields an endpoint that this server may send to, and the only one that it knows."""
    changes = {"webhook_hosts": "127.0.0.1", "secret_key": Fernet.generate_key().decode()}
    settings = get_settings().model_copy(update=changes)
    monkeypatch.setattr(guard, "get_settings", lambda: settings)
    monkeypatch.setattr(secrets, "get_settings", lambda: settings)
    with session_scope() as session:  # what other tests left due is not to be sent here
        session.execute(text("delete from webhook_endpoints"))
    made = Receiver()
    with served(made.app) as address:
        made.url = f"{address}/hook"
        yield made


def send_all(rounds: int = 1) -> None:
    """Sends what is due, as if the pauses between attempts were over."""
    for _ in range(rounds):
        with session_scope() as session:
            session.execute(update(Delivery).where(Delivery.state == "due").values(next_attempt_at=func.now()))
        while send_due():
            pass
