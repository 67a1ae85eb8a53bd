"""Messages of Standard Webhooks."""

from typing import ClassVar, Literal

from core.sinks.sink import Message, Sink
from core.webhooks.guard import Answer, request


class Webhook(Sink):
    """A signed POST of an event.

    Origin: the Standard Webhooks specification.
    """

    kind: Literal["webhook"] = "webhook"
    needs_job: ClassVar[bool] = False

    def send(self, message: Message) -> Answer:
        """Returns the answer."""
        headers = {"content-type": "application/json", **message.signed_headers()}
        return request("POST", message.url, headers, message.body.encode())
