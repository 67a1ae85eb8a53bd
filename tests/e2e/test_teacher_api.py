"""Jobs whose teacher is behind an API: each answer is paid once, and its faults are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import pico
from tests.e2e.stack import Stack
from tests.e2e.teaching import ROWS, submit
from tests.teacher_api import COMPLETION_TOKENS, KEY, PROMPT_TOKENS, TeacherApi

pytestmark = pytest.mark.usefixtures("worker")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_passing_faults_are_waited_out(taught: Stack, endpoint: str) -> None:
    api = TeacherApi()
    api.faults.extend(["429", "500", "half", "nonsense", "empty", "503"])
    with api.serving() as url:
        job = taught.wait(submit(taught, url, endpoint=endpoint, tries=8))
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert set(api.delivered.values()) == {1}
    assert job["stages"][0]["summary"]["teacher_validation"]["accuracy"] > 0.9


def test_votes_are_counted_where_no_probabilities_are_told(taught: Stack) -> None:
    api = TeacherApi(with_logprobs=False)
    with api.serving() as url:
        job = taught.wait(submit(taught, url, [{"kind": "answer", "splits": ["train"]}], top_logprobs=0, votes=2))
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert len(api.delivered) == 2 * ROWS["train"]
    assert {body["seed"] for body in api.seen} == {0, 1}


def test_a_language_model_learns_what_an_api_wrote_and_pays_for_it_once(taught: Stack, tmp_path: Path) -> None:
    words = sorted({word for some in pico.WORDS.values() for word in some.split()})
    pairs = [f"{one} {other}" for one in words[:6] for other in words[:6] if one != other]
    (tmp_path / "pairs").mkdir()
    splits = {name: tmp_path / "pairs" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    for name, path in splits.items():
        rows = [
            {"prompt": pair, "text": "?" if name == "train" else " ".join(reversed(pair.split()))} for pair in pairs
        ]
        rows += [{"prompt": "nothing", "text": "?"}] if name == "train" else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught.push_data(splits, "pairs")
    taught.push_model(pico.write_language_model(tmp_path / "writer", num_layers=2), "writer")
    api = TeacherApi()
    order: dict[str, Any] = {
        "task": {"kind": "causal_lm", "prompt": "prompt", "text": "text", "block_tokens": 32},
        "data": "pairs",
        "student": {"kind": "pretrained", "model": "writer"},
        "stages": [
            {"kind": "generate", "new_tokens": 8},
            {"kind": "finetune", "of": "student", "epochs": 40, "learning_rate": 5e-3, "batch_size": 4, "dropout": 0.0},
            {"kind": "evaluate", "latency_samples": 10},
        ],
    }
    with api.serving() as url:
        teacher = {"kind": "openai", "base_url": url, "model": "big", "secret": "teacher-key"}
        job = taught.wait(taught.submit(**order, teacher=teacher))
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert len(api.delivered) == len(pairs) + 1
    assert set(api.delivered.values()) == {1}
    assert all("logprobs" not in body and body["max_tokens"] == 8 for body in api.seen)
    assert job["stages"][0]["summary"] == {"num_texts": len(pairs), "num_left_out": 1, "num_cut": 0}
    assert "answers_empty" in {event["type"] for event in taught.events(job["id"])}
    [student] = job["stages"][2]["summary"]["models"]
    assert student["name"] == "student"
    assert student["perplexity"] < 2
    assert student["kl_to_teacher"] is None
    again = taught.wait(taught.submit(**order, teacher=teacher | {"concurrency": 1}, seed=0))  # the API is gone
    assert [stage["state"] for stage in again["stages"]] == ["cached", "cached", "succeeded"]


def test_a_budget_ends_the_job_and_what_was_paid_is_kept(taught: Stack) -> None:
    api = TeacherApi()
    each = PROMPT_TOKENS + COMPLETION_TOKENS
    budgets: list[dict[str, Any]] = [
        {"max_requests": 20},
        {"max_tokens": 20 * each},
        {"max_cost": 20 * each / 1e6, "prompt_price": 1.0, "completion_price": 1.0},
    ]
    with api.serving() as url:
        for number, budget in enumerate(budgets, 1):
            job = taught.wait(submit(taught, url, concurrency=1, **budget))
            assert (job["state"], job["error"]["reason"]) == ("failed", "budget_exhausted")
            assert next(iter(budget)) in job["error"]["message"]
            assert "asks only for what is left" in job["error"]["suggestion"]
            assert len(api.delivered) == 20 * number  # what the job before paid for is not paid again
        assert taught.wait(submit(taught, url))["state"] == "succeeded"
    assert set(api.delivered.values()) == {1}


@pytest.mark.parametrize(
    ("fault", "hint", "retried"),
    [("401", "Check base_url, model, secret", False), ("503", "asks only for what is left", True)],
)
def test_an_api_that_refuses_ends_the_job(taught: Stack, fault: str, hint: str, retried: bool) -> None:
    api = TeacherApi()
    api.faults.extend([fault] * 1000)
    with api.serving() as url:
        changes = {"tries": 1, "concurrency": 2}
        job = taught.wait(
            taught.submit(
                teacher={"kind": "openai", "base_url": url, "model": "big", "secret": "teacher-key", **changes},
                student={"kind": "pretrained", "model": "small"},
                stages=[{"kind": "answer"}],
                retries=int(retried),
            )
        )
    assert (job["state"], job["error"]["reason"]) == ("failed", "teacher_unavailable")
    assert fault in job["error"]["message"]
    assert "***" in job["error"]["message"]  # what the API said back
    assert KEY not in json.dumps(job)
    assert hint in job["error"]["suggestion"]
    assert ("stage.retried" in {event["type"] for event in taught.events(job["id"])}) == retried
