"""What every sink is."""

import hmac
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

from core.sinks.facts import JobFacts
from core.strict import StrictModel
from core.webhooks.guard import Answer


class Message(NamedTuple):
    """What is to be told, to whom, and what it is signed with; `job` is None of a test."""

    id: str
    tenant_id: str
    type: str
    body: str
    url: str
    secrets: list[str]
    token: str | None = None
    job: JobFacts | None = None

    def signed_headers(self) -> dict[str, str]:
        """Returns the headers that tell and prove who sends, one signature by each secret.

        Origin: the Standard Webhooks specification, "Signature scheme".
        """
        at = int(datetime.now(UTC).timestamp())
        return {
            "webhook-id": self.id,
            "webhook-timestamp": str(at),
            "webhook-signature": sign(self.secrets, self.id, at, self.body),
        }


def sign(secrets: list[str], message_id: str, at: int, body: str) -> str:
    """Returns the signatures of a message of that time, in seconds since 1970."""
    signed = f"{message_id}.{at}.{body}".encode()
    keys = [b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    return " ".join(f"v1,{b64encode(hmac.digest(key, signed, 'sha256')).decode()}" for key in keys)


class Sink(StrictModel):
    """A form in which others are told, with its settings."""

    kind: str
    needs_job: ClassVar[bool] = True
    needs_points: ClassVar[bool] = False  # the job's metrics as series, which may be many

    def send(self, message: Message) -> Answer:
        """Returns the last answer; one of 300 and above has the message sent again later.

        Raises NotAllowed, OSError or an error of httpcore where there is none.
        """
        raise NotImplementedError
