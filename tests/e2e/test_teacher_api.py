"""Jobs whose teacher is behind an API: it is paid once, its key stays with the supervisor, and its faults are told."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cryptography.fernet import Fernet
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import pico
from tests.e2e.stack import Stack, children_of, free_port, until
from tests.engine_bench import teach_classes
from tests.llama_cpp import STORIES, needs_stories, serving, write_gguf
from tests.teacher_api import COMPLETION_TOKENS, KEY, PROMPT_TOKENS, Forwarder, TeacherApi
from worker.asking import read_answer

SETTINGS = {"STILLHOUSE_SECRET_KEY": Fernet.generate_key().decode(), "STILLHOUSE_TEACHER_HOSTS": "127.0.0.1"}
ROWS = {"train": 180, "validation": 45, "test": 60}
DISTILL = {
    "kind": "distill",
    "epochs": 20,
    "learning_rate": 2e-3,
    "head_learning_rate": 1e-2,
    "batch_size": 16,
    "losses": [{"kind": "forward_kl", "temperature": 1.0}],
}


@pytest.fixture
def stack(tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]) -> Iterator[Stack]:
    """A tenant with a small model, data, and the key of the teacher's API as a secret."""
    stack = Stack(tmp_path, tenant[1])
    try:
        stack.start_api(**SETTINGS)
        stack.push_model(pico.write_model(tmp_path / "small", num_layers=1), "small")
        stack.push_data(pico_files[1], "toy")
        assert stack.http.put("/v1/secrets/teacher-key", json={"value": KEY}).status_code == 200
        yield stack
    finally:
        stack.stop()


def submit(stack: Stack, url: str, stages: list[dict[str, Any]] | None = None, **teacher: Any) -> str:
    described = {"kind": "openai", "base_url": url, "model": "big", "secret": "teacher-key", "tries": 3}
    return stack.submit(
        teacher=described | teacher,
        student={"kind": "pretrained", "model": "small"},
        stages=stages or [{"kind": "answer"}],
    )


def test_a_student_learns_from_an_api_that_is_paid_once_though_its_worker_is_killed(stack: Stack) -> None:
    api, settings = TeacherApi(), SETTINGS
    stages = [
        {"kind": "answer", "splits": ["train", "validation", "test"]},
        DISTILL,
        {"kind": "evaluate", "latency_samples": 10},
    ]
    with api.serving() as url:
        api.left = 50
        worker = stack.start_worker(**settings)
        job_id = submit(stack, url, stages)
        until(lambda: stack.job(job_id)["stages"][0]["step"] == 50)  # the child hears of an answer once it is stored
        child = children_of(worker.pid)[0]
        environment = Path(f"/proc/{child}/environ").read_bytes()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        until(lambda: not os.path.exists(f"/proc/{child}/fd"))
        api.release()
        stack.start_worker(**settings)
        job = stack.wait(job_id)
        assert job["state"] == "succeeded", json.dumps(job, indent=1)
        assert set(api.delivered.values()) == {1}
        assert len(api.delivered) == sum(ROWS.values())
        again = submit(stack, url, stages, prompt="Text: {text}\nLabel:")
        assert stack.wait(again)["state"] == "succeeded"
        assert len(api.delivered) == 2 * sum(ROWS.values())  # another question is another answer
    third = submit(stack, url, stages, concurrency=1)  # the API is gone, and not needed
    assert [stage["state"] for stage in stack.wait(third)["stages"]] == ["cached", "cached", "succeeded"]

    asked = sum(ROWS.values())
    tokens = {"prompt_tokens": asked * PROMPT_TOKENS, "completion_tokens": asked * COMPLETION_TOKENS}
    paid = [stack.http.get(f"/v1/jobs/{one}/usage").json()["teacher"] for one in (job_id, third)]
    assert paid == [{"requests": asked, **tokens}, dict.fromkeys(("requests", *tokens), 0)]
    rows = {row["name"]: row for row in job["stages"][2]["summary"]["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["accuracy"] > 0.9
    assert api.keys == {f"Bearer {KEY}"}
    assert KEY.encode() not in environment
    log = stack.http.get(f"/v1/jobs/{job_id}/stages/0/log").text
    shown = json.dumps([job, stack.events(job_id)]) + log + "".join(p.read_text() for p in stack.folder.glob("*.log"))
    assert KEY not in shown


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_passing_faults_are_waited_out(stack: Stack, endpoint: str) -> None:
    api = TeacherApi()
    api.faults.extend(["429", "500", "half", "nonsense", "empty", "503"])
    with api.serving() as url:
        stack.start_worker(**SETTINGS)
        job = stack.wait(submit(stack, url, endpoint=endpoint, tries=8))
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert set(api.delivered.values()) == {1}
    assert job["stages"][0]["summary"]["teacher_validation"]["accuracy"] > 0.9


def test_votes_are_counted_where_no_probabilities_are_told(stack: Stack) -> None:
    api = TeacherApi(with_logprobs=False)
    with api.serving() as url:
        stack.start_worker(**SETTINGS)
        job = stack.wait(submit(stack, url, [{"kind": "answer", "splits": ["train"]}], top_logprobs=0, votes=2))
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert len(api.delivered) == 2 * ROWS["train"]
    assert {body["seed"] for body in api.seen} == {0, 1}


def test_a_language_model_learns_what_an_api_wrote_and_pays_for_it_once(stack: Stack, tmp_path: Path) -> None:
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
    stack.push_data(splits, "pairs")
    stack.push_model(pico.write_language_model(tmp_path / "writer", num_layers=2), "writer")
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
        stack.start_worker(**SETTINGS)
        teacher = {"kind": "openai", "base_url": url, "model": "big", "secret": "teacher-key"}
        job = stack.wait(stack.submit(**order, teacher=teacher))
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert len(api.delivered) == len(pairs) + 1
    assert set(api.delivered.values()) == {1}
    assert all("logprobs" not in body and body["max_tokens"] == 8 for body in api.seen)
    assert job["stages"][0]["summary"] == {"num_texts": len(pairs), "num_left_out": 1}
    assert "answers_empty" in {event["type"] for event in stack.events(job["id"])}
    [student] = job["stages"][2]["summary"]["models"]
    assert student["name"] == "student"
    assert student["perplexity"] < 2
    assert student["kl_to_teacher"] is None
    again = stack.wait(stack.submit(**order, teacher=teacher | {"concurrency": 1}, seed=0))  # the API is gone
    assert [stage["state"] for stage in again["stages"]] == ["cached", "cached", "succeeded"]


def test_a_budget_ends_the_job_and_what_was_paid_is_kept(stack: Stack) -> None:
    api = TeacherApi()
    each = PROMPT_TOKENS + COMPLETION_TOKENS
    budgets: list[dict[str, Any]] = [
        {"max_requests": 20},
        {"max_tokens": 20 * each},
        {"max_cost": 20 * each / 1e6, "prompt_price": 1.0, "completion_price": 1.0},
    ]
    with api.serving() as url:
        stack.start_worker(**SETTINGS)
        for number, budget in enumerate(budgets, 1):
            job = stack.wait(submit(stack, url, concurrency=1, **budget))
            assert (job["state"], job["error"]["reason"]) == ("failed", "budget_exhausted")
            assert next(iter(budget)) in job["error"]["message"]
            assert "asks only for what is left" in job["error"]["suggestion"]
            assert len(api.delivered) == 20 * number  # what the job before paid for is not paid again
        assert stack.wait(submit(stack, url))["state"] == "succeeded"
    assert set(api.delivered.values()) == {1}


@pytest.mark.parametrize(
    ("fault", "hint", "retried"),
    [("401", "Check base_url, model, secret", False), ("503", "asks only for what is left", True)],
)
def test_an_api_that_refuses_ends_the_job(stack: Stack, fault: str, hint: str, retried: bool) -> None:
    api = TeacherApi()
    api.faults.extend([fault] * 1000)
    with api.serving() as url:
        stack.start_worker(**SETTINGS)
        changes = {"tries": 1, "concurrency": 2}
        job = stack.wait(
            stack.submit(
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
    assert ("stage.retried" in {event["type"] for event in stack.events(job["id"])}) == retried


def test_transformers_serve_teaches_by_its_texts(stack: Stack, tmp_path: Path) -> None:
    """A real server: it gives texts, and takes no notice of logprobs."""
    words = {"refund": " refund", "delivery": " parcel", "login": " password"}
    folder = teach_classes(tmp_path / "language", "please {text} is", words)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (stack.folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    stack.processes.append(server)
    until(lambda: answers(f"http://127.0.0.1:{port}/health"))
    stack.start_worker(**SETTINGS)
    teacher = {"model": str(folder), "endpoint": "completions", "prompt": "please {text} is", "answer_tokens": 1}
    job_id = submit(stack, f"http://127.0.0.1:{port}/v1", secret=None, words=words, **teacher)
    job = stack.wait(job_id)
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert job["stages"][0]["summary"]["teacher_validation"]["accuracy"] > 0.9


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[str]:
    """The address of a llama.cpp server of the model of stories."""
    with serving(write_gguf(STORIES, tmp_path / "stories.gguf")) as address:
        yield address


@dataclass
class Stories:
    """The same model in stock transformers."""

    model: Any = field(default_factory=lambda: AutoModelForCausalLM.from_pretrained(STORIES).eval())
    tokenizer: Any = field(default_factory=lambda: AutoTokenizer.from_pretrained(STORIES))

    @torch.no_grad()
    def tell_next(self, prompt: str) -> torch.Tensor:
        """Returns log p of every token after a prompt, log_p_V."""
        ids = torch.tensor([self.tokenizer(prompt).input_ids])
        return self.model(input_ids=ids).logits[0, -1].double().log_softmax(dim=-1)

    def score(self, prompt: str, words: list[str]) -> torch.Tensor:
        """Returns log p of the words by the 20 likeliest tokens that they begin with, all words being among these."""
        p_K, ids = self.tell_next(prompt).exp().topk(20)
        starts = [token.removeprefix("▁").lower() for token in self.tokenizer.convert_ids_to_tokens(ids.tolist())]
        assert set(words) <= set(starts)
        hits_CK = torch.tensor([[start != "" and word.startswith(start) for start in starts] for word in words])
        p_C = (hits_CK * p_K).sum(dim=-1)
        return (p_C / p_C.sum()).log()


@needs_stories
def test_llama_cpp_is_read_as_the_same_model_in_transformers(llama: str) -> None:
    stories, api = Stories(), httpx.Client(base_url=llama)
    text = "Once upon a  time, Ben's 2 dögs 😀\n met"
    told = api.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    assert told == stories.tokenizer(text).input_ids
    body = {"prompt": "Once upon a time", "max_tokens": 100, "temperature": 0.0, "logprobs": 512}
    answer = api.post("/v1/completions", json=body).json()
    ids = torch.tensor([stories.tokenizer(body["prompt"]).input_ids])
    written = stories.model.generate(input_ids=ids, max_new_tokens=100, do_sample=False)[0]
    places = answer["choices"][0]["logprobs"]["content"]
    assert [place["id"] for place in places] == written[ids.shape[1] :].tolist()
    found_V = torch.zeros(512).double()
    for one in places[0]["top_logprobs"]:
        found_V[one["id"]] = one["logprob"]
    torch.testing.assert_close(found_V, stories.tell_next(body["prompt"]), atol=1e-4, rtol=0)
    read = read_answer("completions", answer)
    assert read.text == answer["choices"][0]["text"]
    assert (read.prompt_tokens, read.completion_tokens) == (ids.shape[1], 100)
    assert sum(math.exp(log_p) for log_p in read.top.values()) == pytest.approx(1.0, abs=1e-5)


BECAUSE = "{text} because"
WHO = {
    "she": ["Lily", "Mia", "Sue", "Jane", "Amy", "Anna", "The girl", "The mom"],
    "he": ["Ben", "Tim", "Tom", "Max", "Sam", "Jack", "The boy", "The dad"],
    "it": ["The ball", "The box", "The car", "The boat", "The tree", "The cake", "The door", "The house"],
}
HOW = {"train": ["big", "old", "red"], "validation": ["small"], "test": ["new"]}


def tell_stories(folder: Path) -> dict[str, Path]:
    """Writes splits of texts after which `because` is mostly followed by their label."""
    folder.mkdir()
    splits = {split: folder / f"{split}.jsonl" for split in HOW}
    for split, path in splits.items():
        rows = [
            {"text": f"{name} was very {how}. {name} was happy", "label": label}
            for how in HOW[split]
            for label, names in WHO.items()
            for name in names
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return splits


def submit_stories(stack: Stack, url: str, stages: list[dict[str, Any]], **teacher: Any) -> str:
    return stack.submit(
        teacher={"kind": "openai", "base_url": url, "model": "stories", "prompt": BECAUSE} | teacher,
        student={"kind": "pretrained", "model": "storyteller"},
        data="stories",
        stages=stages,
    )


def check_answers(stack: Stack, job_id: str, splits: dict[str, Path], prompt: str) -> None:
    """Compares what the first stage kept, and how good it found the teacher, with the model in transformers."""
    job, stories, labels, wanted = stack.wait(job_id), Stories(), sorted(WHO), {}
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    for split, path in splits.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        wanted[split] = torch.stack([stories.score(prompt.format(text=row["text"]), labels) for row in rows])
        if split == "validation":
            hits = [labels[one] == row["label"] for one, row in zip(wanted[split].argmax(dim=-1), rows, strict=True)]
    kept = load(stack.http.get(f"/v1/jobs/{job_id}/artifacts/answers/answers.safetensors").content)
    torch.testing.assert_close(kept["logits"].double(), wanted["train"], atol=1e-4, rtol=0)
    if "test" in kept:
        torch.testing.assert_close(kept["test"].double(), wanted["test"], atol=1e-4, rtol=0)
    accuracy = job["stages"][0]["summary"]["teacher_validation"]["accuracy"]
    assert accuracy == pytest.approx(sum(hits) / len(hits))


@needs_stories
def test_llama_cpp_teaches_by_its_probabilities_and_is_asked_once_though_the_worker_is_killed(
    llama: str, stack: Stack, tmp_path: Path
) -> None:
    splits = tell_stories(tmp_path / "stories")
    stack.push_data(splits, "stories")
    stack.push_model(STORIES, "storyteller")
    api, at_once, num_kept = Forwarder(llama), 8, 30
    stages = [
        {"kind": "answer", "splits": list(HOW)},
        DISTILL | {"epochs": 6},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    with api.serving() as url:
        api.left = num_kept
        worker = stack.start_worker(**SETTINGS)
        asking = {"endpoint": "completions", "answer_tokens": 1, "concurrency": at_once}
        job_id = submit_stories(stack, url, stages, **asking)
        until(lambda: stack.job(job_id)["stages"][0]["step"] == num_kept and len(api.seen) == num_kept + at_once)
        kept = set(api.delivered)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        api.release()
        stack.start_worker(**SETTINGS)
        job = stack.wait(job_id)
    check_answers(stack, job_id, splits, BECAUSE)
    asked = Counter(json.dumps(body, sort_keys=True) for body in api.seen)
    num_texts = sum(len(path.read_text().splitlines()) for path in splits.values())
    assert len(kept) == num_kept
    assert {asked[body] for body in kept} == {1}
    assert Counter(asked.values()) == {1: num_texts - at_once, 2: at_once}  # twice what was on its way, unanswered
    paid = stack.http.get(f"/v1/jobs/{job_id}/usage").json()["teacher"]
    assert (paid["requests"], paid["completion_tokens"]) == (num_texts, num_texts)
    done = dict(line.split() for line in httpx.get(f"{llama}/metrics").text.splitlines() if line[0] != "#")
    assert float(done["llamacpp:tokens_predicted_total"]) == num_texts
    rows = {row["name"]: row for row in job["stages"][2]["summary"]["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["agreement"] > 0.9

    system, short = "Mom and dad went to the park. ", [{"kind": "answer"}]
    job_id = submit_stories(stack, f"{llama}/v1", short, system=system)
    check_answers(stack, job_id, splits, system + BECAUSE)  # as the template CHAT puts a chat
    long = stack.wait(submit_stories(stack, f"{llama}/v1", short, prompt="so " * 600 + BECAUSE))
    assert (long["state"], long["error"]["reason"]) == ("failed", "teacher_unavailable")
    assert "exceeds the available context size" in long["error"]["message"]
