"""Copies of texts with words left out, in the real child, and what answers and learns from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec

AUGMENT = {"kind": "augment", "copies": 3, "deletion_probability": 0.25}
PAIRS = {"kind": "text_classification", "text": "one", "pair": "two"}
ANSWERING = {"teacher": {"kind": "ensemble", "members": [{"model": "one"}, {"model": "two"}]}}
OTHER = {"student": {"kind": "pretrained", "model": "small"}}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_within(some: list[str], words: list[str]) -> bool:
    """Whether some words are among others, in the same order."""
    rest = iter(words)
    return all(word in rest for word in some)


def test_copies_keep_all_but_some_words(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    rows = [
        {"id": n, "one": row["text"], "two": f"{n}  {row['text']}", "label": row["label"]}
        for n, row in enumerate(read(bench.inputs / "data" / "train.jsonl"))
    ]
    rows += [{"id": len(rows), "one": "Zürich", "two": "", "label": "login"}]
    (bench.inputs / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = bench.succeed(make_spec([AUGMENT], task=PAIRS))
    written = read(finished.outputs / "texts" / "train.jsonl")
    assert finished.last["summary"] == {"num_texts": 4 * len(rows)}
    assert written[: len(rows)] == rows
    copies = [written[start : start + len(rows)] for start in range(len(rows), len(written), len(rows))]
    assert len(copies) == 3
    assert len({json.dumps(copy) for copy in copies}) == 3
    num_kept = num_words = 0
    for copy in copies:
        for row, given in zip(copy, rows, strict=True):
            assert (row["id"], row["label"]) == (given["id"], given["label"])
            for column in ("one", "two"):
                assert is_within(row[column].split(), given[column].split())
                assert bool(row[column]) == bool(given[column])
                num_kept, num_words = num_kept + len(row[column].split()), num_words + len(given[column].split())
    assert abs(num_kept / num_words - 0.75) < 4 * (0.25 * 0.75 / num_words) ** 0.5 + 0.01  # one of few always stays
    again, other = (bench.succeed(make_spec([AUGMENT], task=PAIRS, seed=seed), 0, f"seed-{seed}") for seed in (7, 8))
    texts = [(one.outputs / "texts" / "train.jsonl").read_bytes() for one in (finished, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_an_ensemble_answers_the_copies_and_a_student_learns_from_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    for seed, role in enumerate(("teacher_1", "teacher_2")):
        made = bench.succeed(make_spec([{"kind": "finetune", **FAST}], seed=seed), 0, f"train-{role}")
        (made.outputs / "teacher").rename(bench.inputs / role)
    pico.write_model(bench.inputs / "base", num_layers=1)
    stages = [AUGMENT, {"kind": "answer"}, {"kind": "distill", **FAST, "epochs": 4}]
    done = bench.succeed_all(make_spec(stages, **ANSWERING, **OTHER))
    assert done[0].last["summary"] == {"num_texts": 4 * 180}
    assert load_file(bench.inputs / "answers" / "answers.safetensors")["logits"].shape == (4 * 180, 3)
    assert done[2].series("validation/accuracy")[-1][1] > 0.9


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"task": {"kind": "causal_lm"}}, "a causal_lm has no texts whose words can be left out"),
        ({"task": {"kind": "token_classification"}}, "a token_classification has no texts whose words"),
        ({"stages": [{"kind": "answer"}, AUGMENT, {"kind": "distill"}]}, "put 'answer' after it"),
    ],
)
def test_what_cannot_be_copied_is_refused(changes: dict[str, Any], hint: str) -> None:
    spec = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
    with pytest.raises(SpecInvalid) as caught:
        load_spec(spec | {"stages": [AUGMENT, {"kind": "finetune"}]} | changes)
    assert hint in json.dumps(caught.value.details), caught.value.details
    assert any(detail["field"] == f"stages.{int('stages' in changes)}.kind" for detail in caught.value.details)


def test_copies_are_the_same_whoever_answers_them() -> None:
    """So that the stage cache has them for another teacher, too."""
    seen = [
        load_spec({"data": "d", "stages": [AUGMENT, {"kind": "answer"}, {"kind": "distill"}], **OTHER, **teacher})
        for teacher in (ANSWERING, {"teacher": {"model": "m"}})
    ]
    assert seen[0].seen_by(seen[0].stages[0]) == seen[1].seen_by(seen[1].stages[0])
    assert seen[0].seen_by(seen[0].stages[1]) != seen[1].seen_by(seen[1].stages[1])


def test_an_ensemble_is_heard_on_copies_unless_the_spec_says_otherwise() -> None:
    whole = {**ANSWERING, **OTHER, "data": "toy"}
    spec = load_spec(whole)
    assert [stage.kind for stage in spec.stages] == ["augment", "answer", "distill", "export", "evaluate"]
    assert (spec.stages[1].splits, spec.stages[2].epochs) == (["train", "validation", "test"], 1)
    assert load_spec(spec.model_dump(mode="json")) == spec
    tagged = load_spec(whole | {"task": {"kind": "token_classification"}})
    assert [stage.kind for stage in tagged.stages] == ["answer", "distill", "export", "evaluate"]
    assert tagged.stages[1].epochs == 5
