"""Webhooks: real receivers that fail, hang, redirect and answer; and addresses that must never be asked."""

import hmac
import json
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from typing import Any

import httpcore
import pytest
from sqlalchemy import func, text, update
from starlette.responses import PlainTextResponse, RedirectResponse

from core.db import session_scope
from core.settings import Settings
from core.webhooks import guard
from core.webhooks.models import WebhookEndpoint
from core.webhooks.sending import PAUSES_S, send_due
from tests.api import Api, claim_job, jsonl, rows, run_job
from tests.receiving import Receiver, receiving, send_all

HOSTILE_HOSTS = (
    "127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1",
    "localhost", "LOCALHOST", "localhost.", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1",
    "192.168.1.254", "169.254.169.254", "169.254.1.1", "2852039166", "0xa9fea9fe", "100.64.0.1", "100.100.100.200",
    "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[::127.0.0.1]",
    "[fe80::1]", "[fc00::1]", "[fd12:3456::1]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]", "[64:ff9b::7f00:1]",
    "[64:ff9b::a00:1]", "[2002:7f00:1::]", "[2002:a00:1::]", "[2001:0:0:0:0:0:80ff:fffe]",
)  # fmt: skip
HOSTILE = [f"{scheme}://{host}{rest}" for host in HOSTILE_HOSTS for scheme, rest in (
    ("http", "/"), ("https", ":8443/hook"), ("http", ":{port}/?a=b")
)]  # fmt: skip
UNREADABLE = (
    "ftp://example.org/", "file:///etc/passwd", "gopher://example.org/", "http://", "//example.org/", "example.org",
    "http://user@example.org/", "http://user:word@example.org/", "http://example.org:0/", "http://example.org:99999/",
    "http://exa mple.org/", "http://example.org\\@127.0.0.1/", "http://exämple.org/", "http://example.org/\n",
    "javascript:1",
)  # fmt: skip


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving(monkeypatch) as made:
        yield made


def _create(api: Api, url: str, *types: str) -> dict[str, Any]:
    answer = api("POST", "/v1/webhooks", json={"url": url} | ({"event_types": list(types)} if types else {}))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def _deliveries(api: Api, webhook: dict[str, Any], **query: str) -> list[dict[str, Any]]:
    return list(api("GET", f"/v1/webhooks/{webhook['id']}/deliveries", params=query).json()["data"])


def _expected(secret: str, headers: dict[str, str], body: bytes) -> str:
    """Returns the signature by the specification's own words: id, time and body, joined by dots."""
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    return f"v1,{b64encode(hmac.new(b64decode(secret[6:]), signed, 'sha256').digest()).decode()}"


def test_a_job_that_ends_is_told_once_and_signed(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url)
    job_id = api.make_job(name="told", metadata={"team": "nlp"})
    run_job(job_id)
    send_all(2)
    assert len(receiver.seen) == 1
    headers, body = receiver.seen[0]
    told = json.loads(body)
    assert (told["type"], told["data"]["job_id"], told["data"]["state"]) == ("job.succeeded", job_id, "succeeded")
    assert (told["data"]["name"], told["data"]["metadata"]) == ("told", {"team": "nlp"})
    assert headers["webhook-signature"] == _expected(webhook["secret"], headers, body)
    (delivery,) = _deliveries(api, webhook)
    assert (delivery["id"], delivery["state"], delivery["next_attempt_at"]) == (
        headers["webhook-id"],
        "delivered",
        None,
    )
    assert [(one["status"], one["answer"]) for one in delivery["attempts"]] == [(200, "thanks")]


def test_each_type_comes_to_who_asked_for_it(api: Api, other: Api, receiver: Receiver) -> None:
    stages, every, foreign = (
        _create(who, receiver.url, name) for who, name in ((api, "stage.*"), (api, "*"), (other, "*"))
    )
    off = _create(api, receiver.url, "*")
    assert api("PATCH", f"/v1/webhooks/{off['id']}", json={"is_enabled": False}).json()["is_enabled"] is False
    run_job(api.make_job())
    assert {one["type"] for one in _deliveries(api, stages)} == {"stage.running", "stage.succeeded"}
    assert {one["type"] for one in _deliveries(api, every)} >= {"job.running", "stage.succeeded", "job.succeeded"}
    assert (_deliveries(other, foreign), _deliveries(api, off)) == ([], [])


def test_an_endpoint_that_fails_five_times_gets_the_message_in_the_end(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url)
    receiver.answers = [PlainTextResponse("no", code) for code in (500, 503, 429, 404, 301)]
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    for count in range(1, 6):
        send_all()
        (delivery,) = _deliveries(api, webhook)
        assert (delivery["state"], len(delivery["attempts"]), len(receiver.seen)) == ("due", count, count)
    send_all()
    (delivery,) = _deliveries(api, webhook)
    assert delivery["state"] == "delivered"
    assert [one["status"] for one in delivery["attempts"]] == [500, 503, 429, 404, 301, 200]
    assert len({(headers["webhook-id"], body) for headers, body in receiver.seen}) == 1
    for headers, body in receiver.seen:
        assert headers["webhook-signature"] == _expected(webhook["secret"], headers, body)


def test_pauses_grow_and_attempts_end(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url)
    receiver.answers = [PlainTextResponse("no", 500) for _ in range(20)]
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    pauses = []
    for _ in range(9):
        send_all()
        with session_scope() as session:
            left = session.execute(text("select extract(epoch from next_attempt_at - now()) from webhook_deliveries"))
            pauses.append(float(left.scalar_one()))
        assert send_due() == 0  # nothing is sent before its time
    shares = [pause / wanted for pause, wanted in zip(pauses, PAUSES_S, strict=True)]
    assert (min(shares) > 0.6, max(shares) < 1.21, len(set(shares))) == (True, True, 9)
    send_all(3)
    (delivery,) = _deliveries(api, webhook, state="failed")
    assert (len(delivery["attempts"]), len(receiver.seen)) == (10, 10)
    receiver.answers = []
    again = api("POST", f"/v1/webhooks/{webhook['id']}/deliveries/{delivery['id']}/redeliver")
    assert (again.status_code, again.json()["state"]) == (202, "due")
    send_all()
    assert (receiver.seen[-1][0]["webhook-id"], len(receiver.seen)) == (delivery["id"], 11)


def test_an_endpoint_that_is_gone_is_disabled(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url)
    receiver.answers = [PlainTextResponse("", 410)]
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    send_all(2)
    assert len(receiver.seen) == 1
    assert api("GET", f"/v1/webhooks/{webhook['id']}").json()["is_enabled"] is False
    run_job(api.make_job())
    assert [one["type"] for one in _deliveries(api, webhook)] == ["test"]


def test_an_endpoint_that_hangs_or_drips_is_given_up_in_time(
    api: Api, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never answers, or sends its header a letter at a time, so that no single read takes long."""
    monkeypatch.setattr(guard, "TIMEOUT_S", 0.5)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    for letter in b"HTTP/1.1 200 OK\r\nx-slow: " + b"a" * 10_000:
                        try:
                            connection.sendall(bytes([letter]))
                        except OSError:
                            break
                        stop.wait(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        webhook = _create(api, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        api("POST", f"/v1/webhooks/{webhook['id']}/test")
        send_all()
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    (delivery,) = _deliveries(api, webhook)
    (attempt,) = delivery["attempts"]
    assert "Timeout" in attempt["error"]
    assert delivery["state"] == "due"


def test_a_redirect_inward_is_not_followed(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url)
    receiver.answers = [RedirectResponse("/hook", 307)]
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    send_all()
    assert len(receiver.seen) == 1
    assert _deliveries(api, webhook)[0]["attempts"][0]["status"] == 307


def test_for_a_day_after_a_rotation_both_secrets_sign(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url)
    rotated = api("POST", f"/v1/webhooks/{webhook['id']}/rotate").json()
    assert rotated["secret"] != webhook["secret"]
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    send_all()
    with session_scope() as session:
        session.execute(update(WebhookEndpoint).values(overlap_until=func.now()))
    api("POST", f"/v1/webhooks/{webhook['id']}/test")
    send_all()
    (both, body), (one, later) = receiver.seen
    secrets_in_use = (rotated["secret"], webhook["secret"])
    assert both["webhook-signature"].split() == [_expected(secret, both, body) for secret in secrets_in_use]
    assert one["webhook-signature"] == _expected(rotated["secret"], one, later)
    assert "secret" not in api("GET", f"/v1/webhooks/{webhook['id']}").json()


def test_events_are_replayed_from_one_on(api: Api, receiver: Receiver) -> None:
    job_id = api.make_job()
    run_job(job_id)
    webhook = _create(api, receiver.url, "job.*")
    assert _deliveries(api, webhook) == []
    events = api("GET", f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
    wanted = [event for event in events if event["type"].startswith("job.") and event["seq"] > 1]
    replayed = api("POST", f"/v1/webhooks/{webhook['id']}/replay", json={"job_id": job_id, "after": 1})
    assert replayed.status_code == 202
    assert [(one["type"], one["seq"]) for one in replayed.json()["data"]] == [(e["type"], e["seq"]) for e in wanted]
    send_all()
    times = {json.loads(body)["data"]["event"]["seq"]: json.loads(body)["timestamp"] for _, body in receiver.seen}
    assert {seq: at[:19] for seq, at in times.items()} == {event["seq"]: event["at"][:19] for event in wanted}


def test_openais_form_is_sent_where_it_is_named(api: Api, receiver: Receiver) -> None:
    webhook = _create(api, receiver.url, "fine_tuning.job.*")
    api.make_job()
    sent = {"data": {"purpose": "fine-tune"}, "files": [("file", ("a.jsonl", jsonl(rows(30))))]}
    file = api("POST", "/openai/v1/files", **sent).json()
    asked = {"model": "minilm", "training_file": file["id"]}
    answer = api("POST", "/openai/v1/fine_tuning/jobs", json=asked)
    assert answer.status_code == 200, answer.text
    claim_job(answer.json()["stillhouse"]["job_id"])
    api("POST", f"/openai/v1/fine_tuning/jobs/{answer.json()['id']}/cancel")
    assert _deliveries(api, webhook) == []  # it is told once the worker has stopped
    other = api("POST", "/openai/v1/fine_tuning/jobs", json=asked | {"seed": 1}).json()
    api("POST", f"/openai/v1/fine_tuning/jobs/{other['id']}/cancel")
    send_all()
    ((_, body),) = receiver.seen
    told = json.loads(body)
    assert (told["type"], told["object"], told["data"]) == ("fine_tuning.job.cancelled", "event", {"id": other["id"]})


def test_no_connection_is_made_to_an_address_that_is_not_public(
    api: Api, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check at creation lets through, as a name may mean anything, is stopped where it is connected to."""
    made: list[Any] = []
    monkeypatch.setattr(guard, "get_settings", lambda: Settings(webhook_hosts=""))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: made.append(address))
    monkeypatch.setattr(socket, "create_connection", lambda address, *_, **__: made.append(address))
    port = receiver.url.split(":")[2].partition("/")[0]
    urls = [url.replace("{port}", port) for url in HOSTILE]
    assert len(urls) >= 150
    for url in urls:
        with pytest.raises((guard.NotAllowed, OSError, ValueError)):
            guard.request("POST", url, {}, b"{}")
    for url in UNREADABLE:
        with pytest.raises(guard.NotAllowed):
            guard.check_url(url)
    assert made == []


def test_a_name_that_means_another_address_later_is_asked_where_it_was_looked_at(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(receiver.url.split(":")[2].partition("/")[0])
    answers = iter([[(2, 1, 6, "", ("93.184.215.14", port))], [(2, 1, 6, "", ("127.0.0.1", port))]])
    asked: list[Any] = []
    monkeypatch.setattr(guard, "get_settings", lambda: Settings(webhook_hosts=""))
    monkeypatch.setattr(guard.socket, "getaddrinfo", lambda *_, **__: next(answers))

    def connect(address: Any, *_: Any, **__: Any) -> Any:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(httpcore.ConnectError):
        guard.request("POST", f"http://rebinding.example:{port}/hook", {}, b"{}")
    assert asked == [("93.184.215.14", port)]
    with pytest.raises(guard.NotAllowed, match=r"means 127\.0\.0\.1"):
        guard.request("POST", f"http://rebinding.example:{port}/hook", {}, b"{}")
    assert (asked, receiver.seen) == ([("93.184.215.14", port)], [])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "http://10.0.0.1/"}, "url"),
        ({"url": "https://user:word@example.org/"}, "url"),
        ({"url": "https://example.org/", "event_types": ["job.*", "sunrise"]}, "event_types.1"),
        ({"url": "https://example.org/", "event_types": []}, "event_types"),
        ({}, "url"),
        ({"url": "https://example.org/", "secret": "a"}, "secret"),
    ],
)
def test_what_is_refused_names_its_field(api: Api, receiver: Receiver, body: dict[str, Any], field: str) -> None:
    answer = api("POST", "/v1/webhooks", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)
    assert api("GET", "/v1/webhooks").json()["data"] == []
