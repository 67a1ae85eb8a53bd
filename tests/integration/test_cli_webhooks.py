"""`stillhouse webhooks` and the client against the API in this process."""

import json
import sys
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from stillhouse import Client, cli
from tests.api import Api, run_job
from tests.receiving import Receiver, receiving, send_all

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving(monkeypatch) as made:
        yield made


def _connect(api: Api) -> Client:
    from app.main import app

    opened = Client("http://testserver", api.key)
    opened._transport.form.http = TestClient(app)
    return opened


@pytest.fixture
def client(api: Api) -> Client:
    return _connect(api)


@pytest.fixture
def run(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Returns the command line: arguments in; exit code, stdout and stderr out."""
    monkeypatch.setattr("stillhouse.commands.session.Client", lambda: _connect(api))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", "webhooks", *arguments])
        code = cli._run()
        return code, *capsys.readouterr()

    return call


def test_a_webhook_from_its_making_to_its_end(run: Run, api: Api, receiver: Receiver) -> None:
    code, out, _ = run("create", receiver.url, "--event", "job.succeeded", "--name", "ci", "--json")
    webhook = json.loads(out)
    assert (code, webhook["event_types"], webhook["secret"][:6]) == (0, ["job.succeeded"], "whsec_")
    run_job(api.make_job())
    assert run("test", webhook["id"])[0] == 0
    send_all()
    _, out, _ = run("deliveries", webhook["id"])
    assert [line.split()[1:5] for line in out.splitlines()[1:]] == [
        ["test", "delivered", "1", "200"],
        ["job.succeeded", "delivered", "1", "200"],
    ]
    _, out, _ = run("list")
    assert out.splitlines()[1].split() == [webhook["id"], "webhook", receiver.url, "job.succeeded"]
    assert run("delete", webhook["id"])[0] == 0
    assert run("deliveries", webhook["id"])[0] == 3


def test_a_sink_is_given_as_json(run: Run, receiver: Receiver) -> None:
    code, out, _ = run("create", receiver.url, "--sink", '{"kind": "cloudevents"}', "--json")
    assert (code, json.loads(out)["sink"]) == (0, {"kind": "cloudevents"})
    for sink, words in (("{", "no valid JSON"), ("[]", "write an object"), ('{"kind": "pigeon"}', "sink")):
        code, _, err = run("create", receiver.url, "--sink", sink)
        assert (code, words in err) == (2, True)


def test_the_client_does_the_rest(client: Client, api: Api, receiver: Receiver) -> None:
    webhook = client.webhooks.create(receiver.url, ("job.*",))
    job_id = api.make_job()
    run_job(job_id)
    send_all()
    count = len(receiver.seen)
    newest = next(client.webhooks.deliveries(webhook.id, state="delivered"))
    assert client.webhooks.redeliver(webhook.id, newest.id).state == "due"
    replayed = [one.type for one in client.webhooks.replay(webhook.id, job_id, after=1)]
    send_all()
    assert len(receiver.seen) == count + 1 + len(replayed)
    assert client.webhooks.change(webhook.id, is_enabled=False).is_enabled is False
    rotated = client.webhooks.rotate(webhook.id, keep_old=False)
    assert rotated.secret not in {None, webhook.secret}
    assert client.webhooks.get(webhook.id).secret is None
    client.webhooks.delete(webhook.id)
    assert list(client.webhooks.list()) == []
