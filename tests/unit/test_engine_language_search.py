"""The search for the smallest language model, measured again by onnxruntime and the stock tokenizer alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from scipy.special import log_softmax
from transformers import AutoTokenizer, GPT2LMHeadModel

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.methods import ModelFacts
from tests.engine_bench import FAST, Bench, contents, make_spec

TASK = {"kind": "causal_lm", "block_tokens": 32}
RARE = "parcel"
HARD = FAST | {"learning_rate": 2e-2}
FORMS = [{"kind": "onnx_int8"}, {"kind": "onnx_int4", "group": 16}]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A teacher that was fine-tuned."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay_language()
    taught = bench.succeed(make_spec([{"kind": "finetune", **HARD, "epochs": 20}], task=TASK), labels=[])
    bench.adopt(taught, 0, "finetune")
    return bench


def searching(**settings: Any) -> dict[str, Any]:
    stage = {"kind": "search", "distill": HARD, "formats": FORMS, "min_retained": 0.8, "max_trials": 3, **settings}
    stages = [stage, {"kind": "evaluate", "latency_samples": 10}]
    return make_spec(stages, student={"kind": "searched"}, task=TASK)


def loss_of(folder: Path, split: Path) -> float:
    """Returns the mean cross entropy of a form's next tokens, by nothing but onnxruntime and the stock tokenizer."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    past = {
        node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in split.read_text().splitlines()]
    ids = np.concatenate([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    losses: list[float] = []
    for start in range(0, len(ids) - 1, 32):
        read, following = ids[:-1][None, start : start + 32], ids[1:][start : start + 32]
        places = np.arange(read.shape[1])[None]
        given = {"input_ids": read, "attention_mask": np.ones_like(read), "position_ids": places, **past}
        logits_TV = session.run(["logits"], given)[0][0]
        losses += (-log_softmax(logits_TV.astype(np.float64), axis=-1)[np.arange(len(following)), following]).tolist()
    return sum(losses) / len(losses)


def test_the_smallest_language_model_that_keeps_enough_is_found(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    spec = searching()
    searched = bench.succeed(spec, labels=[])
    bench.adopt(searched, 0, "search")
    summary = searched.last["summary"]
    points = {(point["number"], point["form"]): point for point in summary["points"]}
    assert {form for _, form in points} == {"onnx_int8", "onnx_int4"}
    chosen = points[summary["chosen"]["number"], summary["chosen"]["form"]]
    assert chosen["meets"]
    assert chosen["size_bytes"] == min(point["size_bytes"] for point in points.values() if point["meets"])
    form = bench.inputs / chosen["form"]
    assert contents(form) == contents(bench.inputs / "points" / str(chosen["number"]) / chosen["form"])
    validation = bench.inputs / "data" / "validation.jsonl"
    assert math.exp(-loss_of(form, validation)) == pytest.approx(chosen["score"], rel=1e-5)
    teacher = summary["teacher_validation"]
    assert chosen["retained"] == pytest.approx(teacher["perplexity"] * chosen["score"])  # perplexity over its own
    assert chosen["retained"] >= 0.805
    student = GPT2LMHeadModel.from_pretrained(bench.inputs / "student")
    assert student.num_parameters() == chosen["num_parameters"]
    assert student.config.vocab_size == chosen["num_tokens"]  # all of them, with which it can write
    earlier = [{"kind": "search", "state": "succeeded", "seconds": 1.0, "summary": summary, "reused": None}]
    rows = {row["name"]: row for row in bench.succeed(spec, 1, labels=[], earlier=earlier).last["summary"]["models"]}
    assert rows.keys() == {"teacher", "student", form.name}
    test = bench.inputs / "data" / "test.jsonl"
    assert math.log(rows[form.name]["perplexity"]) == pytest.approx(loss_of(form, test), rel=1e-5)


def test_students_may_write_texts_of_their_own_and_lose_tokens(bench: Bench, tmp_path: Path) -> None:
    own = {"share": 0.5, "new_tokens": 8, "prompt_tokens": 4}
    losses = [{"kind": "cross_entropy"}, {"kind": "reverse_kl"}]
    settings = {"distill": {**FAST, "epochs": 2, "on_policy": own, "losses": losses}, "min_retained": 0.01}
    spec = searching(**settings, max_trials=1, trim=True, formats=FORMS[:1])
    bench = bench.copy(tmp_path / "job")
    for split in ("train", "validation"):
        path = bench.inputs / "data" / f"{split}.jsonl"
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if RARE not in line))
    searched = bench.succeed(spec, labels=[])
    [point] = searched.last["summary"]["points"]
    assert searched.series("trial/1/on_policy/share")
    tokenizer = AutoTokenizer.from_pretrained(searched.outputs / "onnx_int8")
    whole = AutoTokenizer.from_pretrained(bench.inputs / "teacher")
    assert whole.get_vocab().keys() - tokenizer.get_vocab().keys() == {RARE}
    assert len(tokenizer) == point["num_tokens"] == len(whole) - 1
    loss = loss_of(searched.outputs / "onnx_int8", bench.inputs / "data" / "validation.jsonl")
    assert math.exp(-loss) == pytest.approx(point["score"], rel=1e-5)


def test_a_goal_is_enough_for_a_language_model() -> None:
    data = {"teacher": {"model": "m"}, "data": "d", "task": {"kind": "causal_lm"}}
    spec = load_spec(data | {"target": {"min_retained": 0.9}})
    search = spec.model_dump()["stages"][1]
    assert [loss["kind"] for loss in search["distill"]["losses"]] == ["cross_entropy", "forward_kl"]
    assert search["trim"] is False
    assert load_spec(spec.model_dump(mode="json")).digest() == spec.digest()
    assert spec.stages[1].check_model(spec, ModelFacts(model_type="llama")) == []
    problems = spec.stages[1].check_model(spec, ModelFacts(model_type="mamba"))
    assert [(problem.field, problem.message) for problem in problems] == [
        ("formats.0", "'onnx_int8' is not written for a 'mamba'; leave it out"),
        ("formats.1", "'onnx_int4' is not written for a 'mamba'; leave it out"),
    ]
    own = {"prompt_tokens": 100, "new_tokens": 40}
    losses = [{"kind": "reverse_kl"}]
    stages = [{"kind": "search", "distill": {"on_policy": own, "losses": losses}}]
    spec = load_spec(data | {"student": {"kind": "searched"}, "stages": stages})
    start = ModelFacts(model_type="gpt2", num_positions=128)
    assert [problem.field for problem in spec.stages[0].check_model(spec, start)] == ["distill.on_policy.new_tokens"]
    stages = [{"kind": "search", "trim": True}, {"kind": "distill"}]
    with pytest.raises(SpecInvalid) as caught:
        load_spec(data | {"student": {"kind": "searched"}, "stages": stages})
    assert {detail["field"]: detail["message"] for detail in caught.value.details} == {
        "stages.0.trim": "'distill' compares the student's tokens with the teacher's; leave it out"
    }
