"""Jobs whose teacher is a real server on loopback: `transformers serve`, which gives texts, and llama.cpp's."""

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
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.stack import Stack, free_port, until
from tests.e2e.teaching import DISTILL, SETTINGS, submit
from tests.engine_bench import teach_classes
from tests.llama_cpp import STORIES, needs_stories, serving, write_gguf
from tests.teacher_api import Forwarder
from worker.asking import read_answer


def test_transformers_serve_teaches_by_its_texts(taught: Stack, tmp_path: Path) -> None:
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
    with (taught.folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    taught.processes.append(server)
    until(lambda: answers(f"http://127.0.0.1:{port}/health"))
    taught.start_worker(**SETTINGS)
    teacher = {"model": str(folder), "endpoint": "completions", "prompt": "please {text} is", "answer_tokens": 1}
    job_id = submit(taught, f"http://127.0.0.1:{port}/v1", secret=None, words=words, **teacher)
    job = taught.wait(job_id)
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
    assert read.usage == (ids.shape[1], 100)
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
    llama: str, taught: Stack, tmp_path: Path
) -> None:
    splits = tell_stories(tmp_path / "stories")
    taught.push_data(splits, "stories")
    taught.push_model(STORIES, "storyteller")
    api, at_once, num_kept = Forwarder(llama), 8, 30
    stages = [
        {"kind": "answer", "splits": list(HOW)},
        DISTILL | {"epochs": 6},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    with api.serving() as url:
        api.left = num_kept
        worker = taught.start_worker(**SETTINGS)
        asking = {"endpoint": "completions", "answer_tokens": 1, "concurrency": at_once}
        job_id = submit_stories(taught, url, stages, **asking)
        until(lambda: taught.job(job_id)["stages"][0]["step"] == num_kept and len(api.seen) == num_kept + at_once)
        kept = set(api.delivered)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        api.release()
        taught.start_worker(**SETTINGS)
        job = taught.wait(job_id)
    check_answers(taught, job_id, splits, BECAUSE)
    asked = Counter(json.dumps(body, sort_keys=True) for body in api.seen)
    num_texts = sum(len(path.read_text().splitlines()) for path in splits.values())
    assert len(kept) == num_kept
    assert {asked[body] for body in kept} == {1}
    assert Counter(asked.values()) == {1: num_texts - at_once, 2: at_once}  # twice what was on its way, unanswered
    paid = taught.http.get(f"/v1/jobs/{job_id}/usage").json()["teacher"]
    assert (paid["requests"], paid["completion_tokens"]) == (num_texts, num_texts)
    done = dict(line.split() for line in httpx.get(f"{llama}/metrics").text.splitlines() if line[0] != "#")
    assert float(done["llamacpp:tokens_predicted_total"]) == num_texts
    rows = {row["name"]: row for row in job["stages"][2]["summary"]["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["agreement"] > 0.9

    system, short = "Mom and dad went to the park. ", [{"kind": "answer"}]
    job_id = submit_stories(taught, f"{llama}/v1", short, system=system)
    check_answers(taught, job_id, splits, system + BECAUSE)  # as the template CHAT puts a chat
    long = taught.wait(submit_stories(taught, f"{llama}/v1", short, prompt="so " * 600 + BECAUSE))
    assert (long["state"], long["error"]["reason"]) == ("failed", "teacher_unavailable")
    assert "exceeds the available context size" in long["error"]["message"]
