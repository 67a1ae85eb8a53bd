"""What a teacher writes for its student: the texts against plain `generate`, and jobs that learn from them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.jobs.resolving import check_models
from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts
from tests import pico
from tests.engine_bench import Bench, make_spec
from worker.child import ForkServer
from worker.engine.generating import ask_for_texts
from worker.engine.loading import load_tokenizer

TASK = {"kind": "causal_lm", "block_tokens": 32}
LEARN = {"kind": "finetune", "epochs": 15, "learning_rate": 5e-3, "batch_size": 4}
WRITE = {"kind": "generate", "new_tokens": 6, "prompt_tokens": 4, "batch_size": 16}
API = {"kind": "openai", "model": "m"}
OTHER = {"kind": "pretrained", "model": "small"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, exact: ForkServer) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("bench"), exact).lay_language()
    bench.adopt(bench.succeed(make_spec([LEARN], task=TASK), labels=[]), 0, "finetune")
    return bench


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_text_goes_on_as_the_teacher_alone_would(bench: Bench) -> None:
    finished = bench.succeed(make_spec([WRITE], task=TASK), 0, "write", labels=[])
    given, written = read(bench.inputs / "data" / "train.jsonl"), read(finished.outputs / "texts" / "train.jsonl")
    folder = bench.inputs / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    num_cut = 0
    for row, found in zip(given, written, strict=True):
        ids = tokenizer(row["text"])["input_ids"]
        prompt = torch.tensor([ids[: min(4, (len(ids) + 1) // 2)]])
        alone = model.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=0)[0]
        assert found["text"] == tokenizer.decode(alone, skip_special_tokens=True)
        assert found["is_cut"] is (0 not in alone.tolist())
        num_cut += found["is_cut"]
    assert 0 < num_cut < len(given)
    assert finished.last["summary"] == {"num_texts": len(given), "num_left_out": 0, "num_cut": num_cut}
    [warning] = [report["event"] for report in finished.of("event") if report["event"]["type"] == "answers_cut"]
    assert warning["data"] == {"num_cut": num_cut, "num_texts": len(given)}
    assert "raise new_tokens" in warning["message"]


def test_how_a_model_writes_by_itself_is_left_aside(bench: Bench, tmp_path: Path) -> None:
    """A chat model comes with a temperature and penalties; what is asked for here is the likeliest token."""
    plain = bench.succeed(make_spec([WRITE], task=TASK), 0, "plain", labels=[])
    other = bench.copy(tmp_path / "bench")
    path = other.inputs / "teacher" / "generation_config.json"
    brought = {"do_sample": True, "temperature": 5.0, "top_k": 5, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | brought))
    found = other.succeed(make_spec([WRITE], task=TASK), 0, "brought", labels=[])
    texts = [read(finished.outputs / "texts" / "train.jsonl") for finished in (plain, found)]
    assert texts[0] == texts[1]


def test_rows_keep_their_prompts_and_rows_without_one_are_left_out(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "bench")
    rows = [{"id": n, "q": question, "a": "late"} for n, question in enumerate(("the parcel", "", "my refund is"))]
    (bench.inputs / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec([WRITE | {"temperature": 1.0}], task=TASK | {"prompt": "q", "text": "a"})
    finished = bench.succeed(spec, 0, "asked", labels=[])
    written = read(finished.outputs / "texts" / "train.jsonl")
    num_cut = sum(row["is_cut"] for row in written)
    assert finished.last["summary"] == {"num_texts": 2, "num_left_out": 1, "num_cut": num_cut}
    assert [(row["id"], row["q"]) for row in written] == [(0, "the parcel"), (2, "my refund is")]
    assert all(not row["a"].startswith(row["q"]) for row in written)


def test_an_answer_of_an_api_that_reached_its_longest_is_cut(tmp_path: Path) -> None:
    rows = [{"q": word, "a": "?", "is_cut": True} for word in ("late", "refund", "money")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = load_spec({"task": TASK | {"prompt": "q", "text": "a"}, "teacher": API, "student": OTHER, "data": "d"})
    answers = [{"text": " a b", "is_cut": True}, {"text": "c", "is_cut": False}, {"text": "", "is_cut": True}]
    warned: dict[str, Any] = {}
    ctx: Any = SimpleNamespace(
        spec=spec,
        seed=0,
        get_split=lambda split: tmp_path / f"{split}.jsonl",
        ask=lambda bodies: [answer for answer, _ in zip(answers, bodies, strict=True)],
        output=lambda _: tmp_path / "out",
        warn=lambda code, message, **counts: warned.update({code: counts}),
    )
    (tmp_path / "out").mkdir()
    summary = ask_for_texts(ctx, spec.stages[0])
    assert summary == {"num_texts": 2, "num_left_out": 1, "num_cut": 1}
    written = read(tmp_path / "out" / "train.jsonl")
    assert written == [{"q": "late", "a": "a b", "is_cut": True}, {"q": "refund", "a": "c", "is_cut": False}]
    assert warned == {
        "answers_empty": {"num_empty": 1, "num_prompts": 3},
        "answers_cut": {"num_cut": 1, "num_texts": 2},
    }


def test_a_prompt_that_is_no_text_is_told_before_any_is_asked(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"q": "late", "a": "?"}\n{"q": 7, "a": "?"}\n')
    spec = load_spec({"task": TASK | {"prompt": "q", "text": "a"}, "teacher": API, "student": OTHER, "data": "d"})
    ctx: Any = SimpleNamespace(spec=spec, get_split=lambda split: tmp_path / f"{split}.jsonl")
    with pytest.raises(StageFailed, match=r"train.jsonl, line 2: .*found 7 in 'q', not a text") as caught:
        ask_for_texts(ctx, spec.stages[0])
    assert caught.value.reason == "dataset_invalid"


def test_an_interrupted_stage_writes_the_same_texts(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "bench")
    spec = make_spec([WRITE | {"temperature": 1.0, "batch_size": 8}], task=TASK)
    whole = bench.succeed(spec, 0, "undisturbed", labels=[])
    found, _ = bench.interrupt(bench.write_order(spec, 0, "killed", labels=[], checkpoint_s=0), 2, "kill")
    again = bench.succeed(spec, 0, "again", labels=[], checkpoint=str(found[-1]))
    assert "going on from text" in again.log
    texts = [(finished.outputs / "texts" / "train.jsonl").read_bytes() for finished in (whole, again)]
    assert texts[0] == texts[1]


def test_a_student_with_other_tokens_learns_the_teachers_texts(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "bench")
    pico.write_language_model(bench.inputs / "base", num_layers=2, is_reversed=True)
    stages = [WRITE, LEARN | {"of": "student"}]
    spec = make_spec(stages, task=TASK, student=OTHER)
    bench.adopt(bench.succeed(spec, 0, "written", labels=[]), 0, "generate")
    finished = bench.succeed(spec, 1, "learned", labels=[])
    assert finished.series("loss/cross_entropy")[-1][1] < 0.5 * finished.series("loss/cross_entropy")[0][1]
    folder = finished.outputs / "student"
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    agreed = total = 0
    for row in read(bench.inputs / "texts" / "train.jsonl")[:40]:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            predicted = student(ids).logits[0, 3:-1].argmax(-1)
        agreed += int((predicted == ids[0, 4:]).sum())
        total += len(predicted)
    assert agreed / total > 0.8


def test_specs_that_cannot_be() -> None:
    with pytest.raises(SpecInvalid, match="a text_classification writes no texts"):
        make_spec([{"kind": "generate"}])
    with pytest.raises(SpecInvalid, match="a later stage changes the teacher"):
        make_spec([WRITE, LEARN], task=TASK)


def test_answers_to_other_texts_are_refused() -> None:
    wrong = [{"kind": "answer"}, WRITE, {"kind": "distill"}]
    with pytest.raises(SpecInvalid, match="put 'answer' after it") as caught:
        make_spec(wrong, task=TASK)
    assert [detail["field"] for detail in caught.value.details] == ["stages.1.kind"]
    make_spec([WRITE, {"kind": "answer"}, {"kind": "distill"}], task=TASK)
    make_spec([{"kind": "answer"}, {"kind": "distill"}, WRITE, {**LEARN, "of": "student"}], task=TASK)
    make_spec([{"kind": "answer"}, {"kind": "distill"}, WRITE, {"kind": "answer"}, {"kind": "distill"}], task=TASK)


@pytest.mark.parametrize(
    ("stage", "field", "role"),
    [
        ({"kind": "generate", "prompt_tokens": 4, "new_tokens": 61}, "new_tokens", "teacher"),
        ({"kind": "distill", "on_policy": {"prompt_tokens": 4, "new_tokens": 61}}, "on_policy.new_tokens", "student"),
    ],
)
def test_texts_that_are_too_long_are_refused_at_submit(stage: dict[str, Any], field: str, role: str) -> None:
    spec = load_spec(make_spec([stage], task=TASK, student=OTHER))
    long, short = (ModelFacts(model_type="gpt2", num_layers=3, num_positions=places) for places in (65, 64))
    assert check_models(spec, {"teacher": long, "base": long}) == []
    roles = {"teacher": "base", "student": "teacher"}  # of the other one, which writes nothing
    assert check_models(spec, {"teacher": short, "base": short} | {roles[role]: long}) == check_models(
        spec, {"teacher": short, "base": short}
    )
    [problem] = check_models(spec, {"teacher": short, "base": short})
    assert problem["field"] == f"stages.0.{field}"
    assert f"65 with prompt_tokens, and the {role} has places for 64 tokens" in problem["message"]
