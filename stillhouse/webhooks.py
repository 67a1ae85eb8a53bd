"""Webhooks of the Python client."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from stillhouse.results import Delivery, Webhook
from stillhouse.transport import Transport

ENDS = ("job.succeeded", "job.failed", "job.cancelled")


class Webhooks:
    """Addresses that are told what happens to your jobs."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
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
        body = {"url": url, "event_types": list(event_types), "name": name, "secret": secret}
        return Webhook.model_validate(
            self._transport.json("POST", "/v1/webhooks", json=body | ({"sink": sink} if sink else {}))
        )

    def list(self) -> Iterator[Webhook]:
        """Yields the webhooks, newest first, without their secrets."""
        return map(Webhook.model_validate, self._transport.data("/v1/webhooks"))

    def get(self, webhook_id: str) -> Webhook:
        """Returns a webhook, without its secret."""
        return Webhook.model_validate(self._transport.json("GET", _path(webhook_id)))

    def change(self, webhook_id: str, **changes: Any) -> Webhook:
        """Returns the webhook with another `url`, `event_types`, `name` or `is_enabled`."""
        return Webhook.model_validate(self._transport.json("PATCH", _path(webhook_id), json=changes))

    def rotate(self, webhook_id: str, *, keep_old: bool = True) -> Webhook:
        """Returns the webhook with a new secret; the old one signs, too, for a day if it is kept."""
        params = {"keep_old": json.dumps(keep_old)}
        return Webhook.model_validate(self._transport.json("POST", f"{_path(webhook_id)}/rotate", params=params))

    def test(self, webhook_id: str) -> Delivery:
        """Sends a message of the type `test`."""
        return Delivery.model_validate(self._transport.json("POST", f"{_path(webhook_id)}/test"))

    def deliveries(self, webhook_id: str, *, state: str | None = None, limit: int | None = None) -> Iterator[Delivery]:
        """Yields what was or is to be sent, newest first."""
        rows = self._transport.pages(f"{_path(webhook_id)}/deliveries", {"state": state}, limit)
        return map(Delivery.model_validate, rows)

    def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Sends a message once more, with the id that it had."""
        path = f"{_path(webhook_id)}/deliveries/{quote(delivery_id, safe='')}/redeliver"
        return Delivery.model_validate(self._transport.json("POST", path))

    def replay(self, webhook_id: str, job_id: str, *, after: int = 0) -> Iterator[Delivery]:
        """Sends a job's events after that `seq` again, as new messages, and yields these."""
        body = {"job_id": job_id, "after": after}
        made = self._transport.json("POST", f"{_path(webhook_id)}/replay", json=body)
        return map(Delivery.model_validate, made["data"])

    def delete(self, webhook_id: str) -> None:
        """Deletes a webhook, with what is due to it."""
        self._transport.request("DELETE", _path(webhook_id))


def _path(webhook_id: str) -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}"
