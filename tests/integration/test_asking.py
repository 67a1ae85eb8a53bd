"""What a supervisor asks a teacher's API: each question once, and the key told to nobody."""

import queue
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select

from core.db import session_scope
from core.ids import new_id
from core.jobs import ownership
from core.jobs.answers import sum_spent, take_request
from core.jobs.creation import create_job
from core.jobs.models import TeacherRequest
from core.jobs.spec import load_spec
from core.settings import get_settings
from tests.e2e.stack import until
from tests.teacher_api import COMPLETION_TOKENS, PROMPT_TOKENS, TeacherApi
from worker import asking
from worker.asking import Asker

BODY = {"messages": [{"role": "user", "content": "Text: my parcel is late\n"}], "logprobs": True}


@pytest.fixture
def claim(tenant: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., ownership.Claim]:
    """Makes a claim on a job whose teacher is at an address."""
    settings = get_settings().model_copy(update={"teacher_hosts": "127.0.0.1"})
    monkeypatch.setattr(asking, "get_settings", lambda: settings)

    def make(url: str, **teacher: Any) -> ownership.Claim:
        name = new_id("q")
        described = {"kind": "openai", "base_url": url, "model": "big"} | teacher
        student = {"kind": "pretrained", "model": "b"}
        spec = load_spec({"teacher": described, "student": student, "data": "d"})
        with session_scope() as session:
            create_job(session, tenant[0], spec, {"data": {}, "labels": []}).queue = name
        with session_scope() as session:
            taken = ownership.claim(session, "w", [name])
        assert taken is not None
        return taken

    return make


def test_equal_requests_at_the_same_time_are_paid_for_once(claim: Callable[..., ownership.Claim]) -> None:
    api, heard = TeacherApi(), queue.Queue()
    api.left = 0
    with api.serving() as url:
        taken = claim(url)
        asker = Asker(taken, heard.put)
        for number in range(4):
            asker.ask(number, BODY)
        api.release()
        told = [heard.get(timeout=60) for _ in range(4)]
        asker.close()
    assert sorted(one["number"] for one in told) == [0, 1, 2, 3]
    assert all(one["answer"] == told[0]["answer"] for one in told)
    assert list(api.delivered.values()) == [1]
    with session_scope() as session:
        spent = sum_spent(session, taken.tenant_id, taken.job_id)
    assert spent == asker._spent == (1, PROMPT_TOKENS, COMPLETION_TOKENS)


def test_jobs_that_ask_the_same_at_the_same_time_pay_once(
    claim: Callable[..., ownership.Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    api, heard, turns = TeacherApi(), [queue.Queue(), queue.Queue()], []
    api.left = 0
    monkeypatch.setattr(asking, "take_request", lambda *given: turns.append(take_request(*given)) or turns[-1])
    with api.serving() as url:
        taken = [claim(url), claim(url)]
        askers = [Asker(*one) for one in zip(taken, [one.put for one in heard], strict=True)]
        askers[0].ask(0, BODY)
        until(lambda: api.seen)
        askers[1].ask(0, BODY)
        until(lambda: turns == [True, False])
        api.release()
        told = [one.get(timeout=60) for one in heard]
        for asker in askers:
            asker.close()
    assert told[0]["answer"] == told[1]["answer"]
    assert len(api.seen) == 1
    with session_scope() as session:
        spent = [sum_spent(session, one.tenant_id, one.job_id) for one in taken]
        assert session.scalar(select(func.count()).select_from(TeacherRequest)) == 0
    assert [one.requests for one in spent] == [1, 0]


def test_a_request_is_another_jobs_once_its_own_gave_it_up(claim: Callable[..., ownership.Claim]) -> None:
    """Whether it was refused, or its worker died on the way; the job itself need not wait."""
    api, heard = TeacherApi(), queue.Queue()
    api.faults.append("401")
    with api.serving() as url:
        first, second = claim(url), claim(url)
        for taken in (first, second):
            asker = Asker(taken, heard.put)
            asker.ask(0, BODY)
            told = heard.get(timeout=60)
            asker.close()
    assert told["answer"]["text"]
    owner = (first.tenant_id, first.job_id, "key")
    other = (second.tenant_id, second.job_id, "key")
    with session_scope() as session:
        assert take_request(session, *owner, 60)
        assert not take_request(session, *other, 60)
        assert take_request(session, *owner, -1)
        assert take_request(session, *other, 60)


def test_that_an_answer_was_cut_is_kept_with_it(claim: Callable[..., ownership.Claim]) -> None:
    heard: queue.Queue[dict[str, Any]] = queue.Queue()
    body = {"messages": [{"role": "user", "content": "late is parcel my"}], "max_tokens": 2}
    with TeacherApi().serving() as url:
        asker = Asker(claim(url), heard.put)
        asker.ask(0, body)
        told = heard.get(timeout=60)
        asker.close()
    assert told["answer"] == {"text": " my parcel\n", "top": None, "is_cut": True}
    asker = Asker(claim(url), heard.put)  # the API is gone
    asker.ask(0, body)
    assert heard.get(timeout=60) == told
    asker.close()


@pytest.mark.parametrize("budget", [{"max_tokens": 10**6}, {"max_cost": 1.0, "prompt_price": 1.0}])
def test_a_budget_that_cannot_be_kept_to_ends_the_asking_and_what_was_paid_is_kept(
    claim: Callable[..., ownership.Claim], budget: dict[str, Any]
) -> None:
    api, heard = TeacherApi(with_usage=False), queue.Queue()
    bodies = [{"messages": [{"role": "user", "content": f"Text: {word}\n"}]} for word in ("late", "refund", "money")]
    with api.serving() as url:
        taken = claim(url, concurrency=1, **budget)
        asker = Asker(taken, heard.put)
        for number, body in enumerate(bodies):
            asker.ask(number, body)
        told = [heard.get(timeout=60) for _ in bodies]
        asker.close()
        assert [one["error"]["reason"] for one in told] == ["teacher_unavailable"] * 3
        assert next(iter(budget)) in told[0]["error"]["message"]
        assert "max_requests" in told[0]["error"]["suggestion"]
        assert len(api.seen) == 1
        with session_scope() as session:
            assert sum_spent(session, taken.tenant_id, taken.job_id) == (1, 0, 0)
        asker = Asker(claim(url, max_requests=2), heard.put)
        for number, body in enumerate(bodies):
            asker.ask(number, body)
        assert all("answer" in heard.get(timeout=60) for _ in bodies)
        asker.close()
    assert list(api.delivered.values()) == [1, 1, 1]


def test_answers_that_cannot_be_read_are_paid_for(
    claim: Callable[..., ownership.Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.0)
    api, heard = TeacherApi(), queue.Queue()
    api.faults.extend(["empty", "nonsense", "503"])
    with api.serving() as url:
        taken = claim(url, tries=4)
        asker = Asker(taken, heard.put)
        asker.ask(0, BODY)
        assert "answer" in heard.get(timeout=60)
        asker.close()
    with session_scope() as session:
        spent = sum_spent(session, taken.tenant_id, taken.job_id)
    assert spent == asker._spent == (3, 2 * PROMPT_TOKENS, 2 * COMPLETION_TOKENS)  # nonsense tells none


def test_a_budget_ends_the_asking_of_an_api_that_cannot_be_read(
    claim: Callable[..., ownership.Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the next attempt at the stage, which asks for the same."""
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.0)
    api, heard = TeacherApi(), queue.Queue()
    api.faults.extend(["empty"] * 9)
    with api.serving() as url:
        taken = claim(url, tries=6, max_tokens=3 * (PROMPT_TOKENS + COMPLETION_TOKENS))
        for _ in range(2):
            asker = Asker(taken, heard.put)
            asker.ask(0, BODY)
            error = heard.get(timeout=60)["error"]
            asker.close()
            assert (error["reason"], "3 answers" in error["message"]) == ("budget_exhausted", True)
    assert len(api.seen) == 3


def test_an_answer_that_trickles_in_has_an_end(claim: Callable[..., ownership.Claim]) -> None:
    api, heard = TeacherApi(), queue.Queue()
    api.faults.append("trickle")
    with api.serving() as url:
        asker = Asker(claim(url, timeout_s=2.0, tries=2), heard.put)
        asker.ask(0, BODY)
        told = heard.get(timeout=20)  # at the second attempt
        asker.close()
    assert "answer" in told
    assert len(api.seen) == 2


def test_what_a_refusal_says_can_be_stored(claim: Callable[..., ownership.Claim]) -> None:
    api, heard = TeacherApi(), queue.Queue()
    api.faults.append("utf-16")
    with api.serving() as url:
        taken = claim(url)
        asker = Asker(taken, heard.put)
        asker.ask(0, BODY)
        error = heard.get(timeout=60)["error"]
        asker.close()
    assert "404" in error["message"]
    with session_scope() as session:
        ownership.start_stage(session, taken, 0)
    with session_scope() as session:
        ownership.fail_stage(session, taken, 0, error, None)


def test_an_error_of_the_client_does_not_show_the_key(
    claim: Callable[..., ownership.Claim], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A header with a line break is refused by the client, which shows it."""
    key = "sk-very-secret\n"
    monkeypatch.setattr(asking, "read_secret", lambda *_: key)
    api, heard = TeacherApi(), queue.Queue()
    with api.serving() as url:
        asker = Asker(claim(url, secret="openai", tries=1), heard.put)
        asker.ask(0, BODY)
        told = heard.get(timeout=60)
        asker.close()
    assert told["error"]["reason"] == "teacher_unavailable"
    assert "sk-very-secret" not in str(told) + caplog.text
    assert not api.seen
