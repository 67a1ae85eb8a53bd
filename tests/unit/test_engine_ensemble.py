"""Several models as one teacher of labels, against stock transformers, scipy and numpy, in the real child."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax
from scipy.stats import entropy
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer

from core.errors import SpecInvalid
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec
from worker.engine.speaking import average_values

TEACHER = {"kind": "ensemble", "members": [{"model": "one"}, {"model": "two", "weight": 3.0}]}
TAGGING = {"kind": "token_classification"}
STUDENT = {"kind": "pretrained", "model": "small"}
STAGES = [
    {"kind": "answer", "splits": ["train", "validation", "test"]},
    {"kind": "distill", **FAST, "epochs": 12, "losses": [{"kind": "forward_kl", "temperature": 2.0}]},
    {"kind": "evaluate", "latency_samples": 10},
]


def test_numbers_are_averaged() -> None:
    values_MN1, weights_M = torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]), torch.tensor([1.0, 3.0]).double()
    assert average_values(values_MN1, weights_M).tolist() == [[2.5], [5.0]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two classifiers that were fine-tuned with different seeds, beside an encoder that knows nothing."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    for seed, role in enumerate(("teacher_1", "teacher_2")):
        spec = make_spec([{"kind": "finetune", **FAST}], seed=seed)
        shutil.copytree(bench.succeed(spec, 0, f"train-{role}").outputs / "teacher", bench.inputs / role)
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_model(bench.inputs / "base", num_layers=1)
    return bench


@pytest.mark.parametrize("weighting", ["fixed", "entropy"])
def test_a_job_goes_from_an_ensemble_to_a_classifier(bench: Bench, tmp_path: Path, weighting: str) -> None:
    bench, student = bench.copy(tmp_path / "job"), STUDENT
    if weighting == "fixed":  # into layers of one of its models
        shutil.rmtree(bench.inputs / "base")
        shutil.copytree(bench.inputs / "teacher_1", bench.inputs / "base")
        student = {"kind": "teacher_layers", "model": "one", "keep": [0, 2]}
    spec = make_spec(STAGES, teacher=TEACHER | {"weighting": weighting}, student=student)
    finished = bench.succeed_all(spec)[-1]
    rows = {row["name"]: row for row in finished.last["summary"]["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["agreement"] > 0.85
    assert "`ensemble`" in (bench.inputs / "report" / "MODEL_CARD.md").read_text()


def test_a_member_without_the_labels_is_told(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    shutil.rmtree(bench.inputs / "teacher_2")
    pico.write_model(bench.inputs / "teacher_2")
    error = bench.run(make_spec(STAGES, teacher=TEACHER, student=STUDENT)).last
    assert error["reason"] == "teacher_unavailable"
    assert "teacher 2 has no head for the labels delivery, login, refund" in error["message"]


TAGS = sorted({"O", *(f"B-{kind}" for kind in pico.WORDS)})
LONGEST = {"teacher_1": 12, "teacher_2": 9}  # in tokens, two of which are no words


@pytest.fixture(scope="module")
def taggers(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two taggers with other tokens, of which the second reads less of a text, beside an encoder."""
    bench = Bench(tmp_path_factory.mktemp("taggers")).lay()
    pico.write_entities(bench.inputs / "data")
    for seed, role in enumerate(LONGEST):
        shutil.rmtree(bench.inputs / "teacher")
        pico.write_model(bench.inputs / "teacher", is_reversed=bool(seed))
        spec = make_spec([{"kind": "finetune", **FAST, "epochs": 2 + seed}], seed=seed, task=TAGGING)
        shutil.copytree(bench.succeed(spec, 0, f"train-{role}", labels=TAGS).outputs / "teacher", bench.inputs / role)
    settings = bench.inputs / "teacher_2" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": LONGEST["teacher_2"]}))
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_model(bench.inputs / "base", num_layers=1)
    return bench


def tag(bench: Bench, split: str, weighting: str) -> tuple[list[list[str]], list[Any]]:
    """Returns the tags of each text, and of each word what the members that read it say by stock transformers, p_C."""
    models = []
    for (role, longest), weight in zip(LONGEST.items(), (1.0, 3.0), strict=True):
        model = AutoModelForTokenClassification.from_pretrained(bench.inputs / role).eval()
        assert list(model.config.id2label.values()) == TAGS
        models.append((AutoTokenizer.from_pretrained(bench.inputs / role), model, longest, weight))
    tags, found = [], []
    for line in (bench.inputs / "data" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        tags.append(row["tags"])
        said: list[list[tuple[float, Any]]] = [[] for _ in row["tokens"]]
        for tokenizer, model, longest, weight in models:
            words = {"is_split_into_words": True, "truncation": True, "max_length": longest}
            read = tokenizer(row["tokens"], **words, return_tensors="pt")
            with torch.no_grad():
                p_TC = softmax(model(**read).logits[0].double().numpy(), axis=-1)
            for place, word in enumerate(read.word_ids()):
                if word is not None:
                    share = weight / entropy(p_TC[place]) if weighting == "entropy" else weight
                    said[word].append((share, p_TC[place]))
        found += [np.average([p for _, p in one], axis=0, weights=[w for w, _ in one]) if one else None for one in said]
    return tags, found


@pytest.mark.parametrize("weighting", ["fixed", "entropy"])
def test_a_job_goes_from_an_ensemble_to_a_tagger(taggers: Bench, tmp_path: Path, weighting: str) -> None:
    bench = taggers.copy(tmp_path / "job")
    stages = [STAGES[0] | {"max_length": LONGEST["teacher_1"]}, *STAGES[1:]]
    spec = make_spec(stages, teacher=TEACHER | {"weighting": weighting}, student=STUDENT, task=TAGGING)
    _, distil, evaluate = bench.succeed_all(spec, labels=TAGS)
    kept = load_file(bench.inputs / "answers" / "answers.safetensors")
    for split, name in (("train", "logits"), ("test", "test")):
        tags, p_NC = tag(bench, split, weighting)
        assert len(kept[name]) == len(p_NC)
        for logits_C, p_C in zip(kept[name].numpy(), p_NC, strict=True):
            if p_C is None:
                assert not logits_C.any()
            else:
                assert softmax(logits_C) == pytest.approx(p_C, rel=1e-3)
    assert any(p_C is None for p_C in p_NC)
    chosen = iter("O" if p_C is None else TAGS[p_C.argmax()] for p_C in p_NC)
    teacher, student = evaluate.last["summary"]["models"]
    assert teacher["f1"] == pytest.approx(f1_score(tags, [[next(chosen) for _ in text] for text in tags]))
    assert 0.5 < distil.last["summary"]["teacher_validation"]["f1"] < 1
    assert student["agreement"] > 0.85
    assert student["f1"] > teacher["f1"] - 0.1


def test_a_tagger_with_other_tags_is_told(taggers: Bench, tmp_path: Path) -> None:
    bench = taggers.copy(tmp_path / "job")
    error = bench.run(make_spec(STAGES, teacher=TEACHER, student=STUDENT, task=TAGGING), labels=[*TAGS, "I-login"]).last
    assert error["reason"] == "teacher_unavailable"
    assert "The teacher 1 has no head for the labels B-delivery, B-login," in error["message"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"task": {"kind": "text_regression"}, "teacher": TEACHER | {"weighting": "entropy"}}, "numbers have no entropy"),
    ({"teacher": TEACHER | {"members": [{"model": "one"}]}}, "at least 2"),
    ({"student": {"kind": "teacher_layers", "keep": [0]}}, "use kind 'pretrained'"),
]


@pytest.mark.parametrize(("changes", "hint"), BAD)
def test_specs_that_cannot_be(changes: dict[str, Any], hint: str) -> None:
    with pytest.raises(SpecInvalid, match=hint):
        make_spec([{"kind": "answer"}], **{"teacher": TEACHER, "student": STUDENT, **changes})
