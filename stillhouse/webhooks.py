"""Webhooks of the Python client."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import quote

from stillhouse.forms import F, call, iterate
from stillhouse.results import Delivery, Webhook
from stillhouse.transport import Group

ENDS = ("job.succeeded", "job.failed", "job.cancelled")


class Webhooks(Group[F]):
    """Addresses that are told what happens to your jobs."""

    @call
    async def create(
        self,
        url: str,
        event_types: tuple[str, ...] = ENDS,
        *,
        name: str = "",
        sink: dict[str, Any] | None = None,
        secret: str | None = None,
    ) -> Webhook:
        """Returns a new webhook; its `secret` signs messages, and is never shown again.

        `sink` has them in another form, as `{"kind": "mlflow", …}`, and `secret` names one of yours to ask that with.
        """
        body: dict[str, Any] = {"url": url, "event_types": list(event_types), "name": name, "secret": secret}
        body |= {"sink": sink} if sink else {}
        return await self._transport.result(Webhook, "POST", "/v1/webhooks", json=body)

    @iterate
    def list(self) -> AsyncIterator[Webhook]:
        """Yields the webhooks, newest first, without their secrets."""
        return self._transport.page(Webhook, "/v1/webhooks")

    @call
    async def get(self, webhook_id: str) -> Webhook:
        """Returns a webhook, without its secret."""
        return await self._transport.result(Webhook, "GET", _path(webhook_id))

    @call
    async def change(self, /, webhook_id: str, **changes: Any) -> Webhook:
        """Returns the webhook with another `url`, `event_types`, `name` or `is_enabled`."""
        return await self._transport.result(Webhook, "PATCH", _path(webhook_id), json=changes)

    @call
    async def rotate(self, webhook_id: str, *, keep_old: bool = True) -> Webhook:
        """Returns the webhook with a new secret; the old one signs, too, for a day if it is kept."""
        params = {"keep_old": json.dumps(keep_old)}
        return await self._transport.result(Webhook, "POST", f"{_path(webhook_id)}/rotate", params=params)

    @call
    async def test(self, webhook_id: str) -> Delivery:
        """Sends a message of the type `test`."""
        return await self._transport.result(Delivery, "POST", f"{_path(webhook_id)}/test")

    @iterate
    def deliveries(
        self, webhook_id: str, *, state: str | None = None, limit: int | None = None
    ) -> AsyncIterator[Delivery]:
        """Yields what was or is to be sent, newest first."""
        return self._transport.pages(Delivery, f"{_path(webhook_id)}/deliveries", {"state": state}, limit)

    @call
    async def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Sends a message once more, with the id that it had."""
        path = f"{_path(webhook_id)}/deliveries/{quote(delivery_id, safe='')}/redeliver"
        return await self._transport.result(Delivery, "POST", path)

    @call
    async def replay(self, webhook_id: str, job_id: str, *, after: int = 0) -> Sequence[Delivery]:
        """Sends a job's events after that `seq` again, as new messages, and returns these."""
        body = {"job_id": job_id, "after": after}
        made = await self._transport.json("POST", f"{_path(webhook_id)}/replay", json=body)
        return [Delivery.model_validate(item) for item in made["data"]]

    @call
    async def delete(self, webhook_id: str) -> None:
        """Deletes a webhook, with what is due to it."""
        await self._transport.request("DELETE", _path(webhook_id))


def _path(webhook_id: str) -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}"
