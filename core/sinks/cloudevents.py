"""CloudEvents over HTTP."""

import json
from typing import ClassVar, Literal

from core.sinks.sink import Message, Sink
from core.webhooks.guard import Answer, request


class CloudEvents(Sink):
    """A POST of an event whose attributes are in headers; it is signed as a webhook is, too.

    Origin: CloudEvents 1.0.2, HTTP Protocol Binding, section 3.1 (binary content mode).
    """

    kind: Literal["cloudevents"] = "cloudevents"
    needs_job: ClassVar[bool] = False

    def send(self, message: Message) -> Answer:
        """Returns the answer."""
        told = json.loads(message.body)
        headers = {
            "content-type": "application/json",
            "ce-specversion": "1.0",
            "ce-id": message.id,
            "ce-source": f"/stillhouse/{message.tenant_id}",
            "ce-type": f"stillhouse.{message.type}",
            "ce-subject": str(told["data"].get("job_id", "")) or message.type,
            **({"ce-time": told["timestamp"]} if "timestamp" in told else {}),
        }
        data = json.dumps(told["data"], ensure_ascii=False)
        signed = message._replace(body=data).signed_headers()
        return request("POST", message.url, headers | signed, data.encode())
