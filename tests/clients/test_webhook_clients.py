"""Messages of this server, as the libraries of receivers check them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from core.sinks.sink import sign
from tests.api import Api, jsonl, rows
from tests.clients.conftest import python_of, run
from tests.receiving import receiving, send_all

VERIFIER = Path(__file__).parent / "webhook_verifying.py"
LIBRARIES = ("standardwebhooks==1.1.0", "openai==1.109.1", "openai==3.57.0")
REFUSED = {"standardwebhooks": "WebhookVerificationError", "openai": "InvalidWebhookSignatureError"}


@pytest.mark.parametrize("client", LIBRARIES)
def test_messages_are_accepted_and_others_refused(
    client: str, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first as it came, one after a rotation, one that was changed, one that is six minutes old."""
    python = python_of(client)
    with receiving(monkeypatch) as receiver:
        asked = {"url": receiver.url, "event_types": ["fine_tuning.job.*"]}
        webhook = api("POST", "/v1/webhooks", json=asked).json()
        _cancel_one(api)
        send_all()
        api("POST", f"/v1/webhooks/{webhook['id']}/rotate")
        _cancel_one(api, seed=1)
        send_all()
    (first, body), second = receiver.seen
    messages: list[Any] = [(first, body.decode()), (second[0], second[1].decode()), (first, body.decode() + " ")]
    old = datetime.now(UTC) - timedelta(minutes=6)
    seconds = int(old.timestamp())
    signature = sign([webhook["secret"]], first["webhook-id"], seconds, body.decode())
    aged = {"webhook-timestamp": str(seconds), "webhook-signature": signature}
    messages.append((first | aged, body.decode()))
    (tmp_path / "messages.json").write_text(json.dumps({"secret": webhook["secret"], "messages": messages}))
    name = client.partition("==")[0]
    seen = json.loads(run([python, VERIFIER, str(tmp_path / "messages.json")]).splitlines()[-1])[name]
    accepted = [one if isinstance(one, str) else one["type"] for one in seen[:2]]
    assert accepted == ["fine_tuning.job.cancelled"] * 2
    assert seen[2:] == [REFUSED[name]] * 2


def _cancel_one(api: Api, **more: Any) -> None:
    if api("GET", "/v1/models/minilm").status_code == 404:
        assert api.push_model().status_code == 201
    sent = {"data": {"purpose": "fine-tune"}, "files": [("file", ("a.jsonl", jsonl(rows(30))))]}
    file = api("POST", "/openai/v1/files", **sent).json()["id"]
    job = api("POST", "/openai/v1/fine_tuning/jobs", json={"model": "minilm", "training_file": file, **more})
    assert api("POST", f"/openai/v1/fine_tuning/jobs/{job.json()['id']}/cancel").status_code == 200
