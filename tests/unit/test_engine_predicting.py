"""What models say of texts that no split has: every kind of task against stock `transformers`, in the real child."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from tests import pico
from tests.engine_bench import FAST, LABELS, Bench, Finished, make_spec

TEXTS = ["my parcel is late", "reset the password code now please", "Refund"]
LEARN = [FAST | {"kind": "finetune", "epochs": 3, "of": role} for role in ("teacher", "student")]
TAGS = ["B-delivery", "B-login", "B-refund", "O"]


def predict(bench: Bench, task: dict[str, Any], labels: list[str], **settings: Any) -> Finished:
    spec = make_spec([*LEARN, {"kind": "predict", "texts": TEXTS, **settings}], task=task)
    return bench.succeed_all(spec, labels=labels)[-1]


def rows_of(finished: Finished) -> list[dict[str, Any]]:
    found = json.loads((finished.outputs / "predictions" / "predictions.json").read_text())
    assert [row["text"] for row in found] == TEXTS
    summary = finished.last["summary"]
    assert summary["num_texts"] == len(TEXTS)
    assert {role: len(times) for role, times in summary["milliseconds"].items()} == {"teacher": 3, "student": 3}
    assert min(ms for times in summary["milliseconds"].values() for ms in times) > 0
    assert not any(text in finished.log for text in TEXTS)
    return found


def change_labels(bench: Bench, change: Any) -> None:
    for path in (bench.inputs / "data").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"text": row["text"]} | change(row)) + "\n" for row in rows))


def logits_of(auto_class: Any, folder: Path, text: str) -> torch.Tensor:
    with torch.no_grad():
        return auto_class.from_pretrained(folder)(
            **AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        ).logits[0]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path).lay()


def test_labels_have_the_probabilities_that_stock_transformers_gives_them(bench: Bench) -> None:
    found = rows_of(predict(bench, {"kind": "text_classification"}, LABELS))
    for row in found:
        for role in ("teacher", "student"):
            p_C = logits_of(AutoModelForSequenceClassification, bench.inputs / role, row["text"]).softmax(-1)
            told = {one["label"]: one["probability"] for one in row[role]["labels"]}
            assert told == pytest.approx(dict(zip(LABELS, p_C.tolist(), strict=True)), abs=1e-5)
            assert list(told) == sorted(told, key=lambda label: -told[label])


def test_each_of_several_labels_has_its_own(bench: Bench) -> None:
    change_labels(bench, lambda row: {"labels": [row["label"], "login"] if row["label"] == "refund" else []})
    found = rows_of(predict(bench, {"kind": "multi_label_classification"}, ["login", "refund"]))
    for row in found:
        p_C = logits_of(AutoModelForSequenceClassification, bench.inputs / "student", row["text"]).sigmoid()
        told = {one["label"]: one["probability"] for one in row["student"]["labels"]}
        assert told == pytest.approx({"login": p_C[0].item(), "refund": p_C[1].item()}, abs=1e-5)


def test_a_regression_gives_its_number(bench: Bench) -> None:
    change_labels(bench, lambda row: {"value": len(row["text"]) / 40})
    for row in rows_of(predict(bench, {"kind": "text_regression"}, ["value"])):
        for role in ("teacher", "student"):
            z_1 = logits_of(AutoModelForSequenceClassification, bench.inputs / role, row["text"])
            assert row[role]["value"] == pytest.approx(z_1.item(), abs=1e-5)


def test_each_word_gets_a_tag(bench: Bench) -> None:
    pico.write_entities(bench.inputs / "data")
    for row in rows_of(predict(bench, {"kind": "token_classification"}, TAGS)):
        words = row["text"].split()
        p_TC = logits_of(AutoModelForTokenClassification, bench.inputs / "student", row["text"]).softmax(-1)[1:-1]
        assert [one["word"] for one in row["student"]["words"]] == words  # each of one token in this vocabulary
        for one, p_C in zip(row["student"]["words"], p_TC, strict=True):
            assert (one["label"], one["probability"]) == (TAGS[p_C.argmax()], pytest.approx(p_C.max().item(), abs=1e-5))


def test_a_language_model_goes_on_as_it_does_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    finished = predict(bench, {"kind": "causal_lm", "block_tokens": 32}, [], new_tokens=6)
    for row in rows_of(finished):
        for role in ("teacher", "student"):
            folder = bench.inputs / role
            model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            given = tokenizer(row["text"], return_tensors="pt")
            ids_T = model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=0)[0]
            written_T = ids_T[given["input_ids"].shape[1] :]
            assert row[role]["continuation"] == tokenizer.decode(written_T, skip_special_tokens=True)
            assert row[role]["is_cut"] is (0 not in written_T.tolist())


def test_every_task_of_several_answers(bench: Bench) -> None:
    parts = {"intent": {"kind": "text_classification"}, "size": {"kind": "text_regression", "value": "words"}}
    for path in list((bench.inputs / "data").iterdir()):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        for name in parts:
            target = path.with_suffix("") / f"{name}.jsonl"
            target.parent.mkdir(exist_ok=True)
            target.write_text("".join(json.dumps(row | {"words": len(row["text"]) / 40}) + "\n" for row in rows))
    data = {split: dict.fromkeys(parts, f"toy/{split}") for split in ("train", "validation", "test")}
    task = {"kind": "multi_task", "tasks": parts}
    spec = make_spec([*LEARN, {"kind": "predict", "texts": TEXTS}], task=task, data=data)
    labels = [*(f"intent/{label}" for label in LABELS), "size/words"]
    for row in rows_of(bench.succeed_all(spec, labels=labels)[-1]):
        z_C = logits_of(AutoModelForSequenceClassification, bench.inputs / "student", row["text"])
        told = {one["label"]: one["probability"] for one in row["student"]["tasks"]["intent"]["labels"]}
        assert told == pytest.approx(dict(zip(LABELS, z_C[:3].softmax(-1).tolist(), strict=True)), abs=1e-5)
        assert row["student"]["tasks"]["size"]["value"] == pytest.approx(z_C[3].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "task", "expected"),
    [
        ({"pairs": ["b"]}, {"kind": "text_classification"}, "stages.1.pairs: an example of this task has one text"),
        ({}, {"kind": "text_classification", "pair": "other"}, "stages.1.pairs: 3 texts have 0 second ones"),
        ({"texts": [" \n"]}, {"kind": "text_classification"}, "stages.1.texts.0: "),
        ({"texts": ["a"] * 33}, {"kind": "text_classification"}, "stages.1.texts: "),
    ],
)
def test_texts_that_do_not_fit_are_refused(settings: dict[str, Any], task: dict[str, Any], expected: str) -> None:
    stages = [{"kind": "distill"}, {"kind": "predict", "texts": TEXTS, **settings}]
    student = {"kind": "teacher_layers", "keep": [0]}
    with pytest.raises(SpecInvalid) as refused:
        load_spec({"teacher": {"model": "m"}, "student": student, "data": "d", "task": task, "stages": stages})
    assert refused.value.message.startswith(expected)


def test_there_must_be_a_student() -> None:
    with pytest.raises(SpecInvalid, match="stage 'predict' needs a student; add a stage that makes one"):
        make_spec([{"kind": "predict", "texts": TEXTS}])
