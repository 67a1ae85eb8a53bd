"""Students that start from another model than their teacher, through the real child process."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
)

from tests import pico
from tests.engine_bench import FAST, LABELS, Bench, contents, make_spec
from worker.engine.alike import read_alike
from worker.engine.loading import load_tokenizer

STUDENT = {"kind": "pretrained", "model": "other"}
LONG = FAST | {"epochs": 20}  # what is learned is learned from nothing
LANGUAGE = {"kind": "causal_lm", "block_tokens": 32}
LANGUAGE_FAST = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8}
KL = [{"kind": "forward_kl", "temperature": 1.0}]


def spec_of(stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return make_spec(stages, student=STUDENT, **changes)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A fine-tuned teacher of three layers beside a student of one, to which every word has another id."""
    bench = Bench(tmp_path_factory.mktemp("classifiers")).lay()
    pico.write_model(bench.inputs / "base", num_layers=1, is_reversed=True)
    bench.adopt(bench.succeed(spec_of([{"kind": "finetune", **FAST}]), 0, "teacher"), 0, "finetune")
    return bench


def test_each_classifier_reads_texts_its_own_way(classifiers: Bench) -> None:
    stages = [{"kind": "finetune"}, {"kind": "distill", **LONG, "losses": [{"kind": "forward_kl"}]}]
    finished = classifiers.succeed(spec_of(stages), 1)
    summary = finished.last["summary"]
    assert summary["teacher_validation"]["accuracy"] > 0.9
    assert summary["validation"]["accuracy"] > 0.9  # by the teacher's answers alone: these are to the same texts
    folder = finished.outputs / "student"
    student, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert student.config.num_hidden_layers == 1
    base = AutoTokenizer.from_pretrained(classifiers.inputs / "base")
    assert tokenizer("parcel late").input_ids == base("parcel late").input_ids


def test_kept_answers_are_those_of_stock_transformers_and_spare_the_teacher(classifiers: Bench, tmp_path: Path) -> None:
    bench = classifiers.copy(tmp_path / "kept")
    stages = [{"kind": "finetune"}, {"kind": "answer"}, {"kind": "distill", **LONG, "losses": [{"kind": "forward_kl"}]}]
    spec = spec_of(stages)
    kept = bench.succeed(spec, 1, "kept")
    bench.adopt(kept, 1, "answer")
    teacher = AutoModelForSequenceClassification.from_pretrained(bench.inputs / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(bench.inputs / "teacher")
    texts = [json.loads(line)["text"] for line in (bench.inputs / "data" / "train.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = teacher(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert [teacher.config.id2label[index] for index in range(len(LABELS))] == LABELS
    torch.testing.assert_close(load_file(bench.inputs / "answers" / "answers.safetensors")["logits"], logits)
    for path in (bench.inputs / "teacher").iterdir():
        if path.suffix == ".safetensors":
            path.unlink()
    heard = bench.succeed(spec, 2, "heard")
    assert heard.last["summary"]["validation"]["accuracy"] > 0.9
    assert heard.last["summary"]["teacher_validation"] == kept.last["summary"]["teacher_validation"]


def test_layers_of_models_with_other_tokens_are_not_compared(classifiers: Bench) -> None:
    stages = [{"kind": "finetune"}, {"kind": "distill", "losses": [{"kind": "cross_entropy"}, {"kind": "relations"}]}]
    finished = classifiers.run(spec_of(stages), 1, name="layers")
    assert finished.last["reason"] == "vocab_incompatible"
    assert "Leave the losses on layers out" in finished.last["suggestion"]


@pytest.mark.parametrize("losses", [["forward_kl"], ["forward_kl", "relations"]], ids=["ahead", "online"])
def test_a_student_reads_no_further_than_its_teacher(losses: list[str], tmp_path: Path) -> None:
    """Which has places for 8 tokens: all is as if no text were to have more."""
    bench = Bench(tmp_path).lay()
    pico.write_model(bench.inputs / "teacher", num_positions=8)
    pico.write_model(bench.inputs / "base", num_layers=1)
    assert max(len(json.loads(line)["text"].split()) for line in (bench.inputs / "data" / "train.jsonl").open()) > 8
    stage = {"kind": "distill", "epochs": 2, "losses": [{"kind": kind} for kind in losses]}
    cut, expected = (bench.succeed(spec_of([stage | {"max_length": n}]), 0, str(n)) for n in (64, 8))
    assert contents(cut.outputs) == contents(expected.outputs)


def write_alike(folder: Path, *, has_types: bool) -> Path:
    """Writes a BERT whose tokenizer tells types of tokens, or a DistilBERT, which takes none; returns its folder."""
    path = pico.write_model(folder) / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    if not has_types:
        sizes = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 64}
        DistilBertModel(DistilBertConfig(vocab_size=len(load_tokenizer(folder)), **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["ahead", "online", "kept"])
@pytest.mark.parametrize("typed", ["teacher", "base"])
def test_a_model_without_types_of_tokens_reads_single_texts_as_one_with_them(
    typed: str, how: str, tmp_path: Path
) -> None:
    bench = Bench(tmp_path).lay()
    for role in ("teacher", "base"):
        write_alike(bench.inputs / role, has_types=role == typed)
    losses = [{"kind": "forward_kl"}, *([] if how == "ahead" else [{"kind": "hidden_mse", "layers": [[2, 2]]}])]
    distill = {"kind": "distill", "epochs": 3, "deletion_probability": 0.3, "losses": losses}
    answer = [{"kind": "answer", "layers": {"hidden": [2]}}] if how == "kept" else []
    done = bench.succeed_all(spec_of([*answer, distill]))
    assert done[-1].log.count("the teacher answered") == (3 if how == "ahead" else 0)


@pytest.mark.parametrize("role", [0, 1])
def test_types_tell_two_texts_apart(role: int, tmp_path: Path) -> None:
    folders = [write_alike(tmp_path / str(has_types), has_types=has_types) for has_types in (True, False)]
    readers = [(AutoModel.from_pretrained(folder), load_tokenizer(folder)) for folder in folders]
    for reads_pairs in (True, False):
        task: Any = SimpleNamespace(reads_pairs=reads_pairs, settle_tokenizer=lambda _: None)
        assert read_alike(task, readers[role], readers[1 - role], 64) is not reads_pairs


@pytest.mark.parametrize("num_padding", [0, 7])
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_language_model_with_more_logits_than_tokens_learns(tmp_path: Path, num_padding: int, is_kept: bool) -> None:
    """Seven columns that no token has; without them the student is the same size as its teacher."""
    bench = Bench(tmp_path).lay_language()
    pico.write_language_model(bench.inputs / "base", num_layers=1, num_padding=num_padding)
    answer = [{"kind": "answer", "top_k": 100}] if is_kept else []
    stages = [
        {"kind": "finetune", **LANGUAGE_FAST},
        *answer,
        {"kind": "distill", **LANGUAGE_FAST, "losses": KL},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = spec_of(stages, task=LANGUAGE)
    for ordinal, stage in enumerate(spec["stages"]):
        finished = bench.succeed(spec, ordinal, labels=[])
        bench.adopt(finished, ordinal, stage["kind"])
    rows = {row["name"]: row for row in finished.last["summary"]["models"]}
    assert 0 < rows["student"]["kl_to_teacher"] < 0.15
    student = AutoModelForCausalLM.from_pretrained(bench.inputs / "student")
    teacher = AutoModelForCausalLM.from_pretrained(bench.inputs / "teacher")
    assert student.config.vocab_size == teacher.config.vocab_size + num_padding


def test_a_language_model_with_other_tokens_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    pico.write_language_model(bench.inputs / "base", num_layers=1, is_reversed=True)
    finished = bench.run(spec_of([{"kind": "distill", "losses": KL}], task=LANGUAGE), 0, labels=[])
    assert finished.last["reason"] == "vocab_incompatible"
    assert "id 2 is" in finished.last["message"]
    assert "teacher's tokenizer" in finished.last["suggestion"]


def test_a_student_alone_needs_no_teacher(classifiers: Bench, tmp_path: Path) -> None:
    bench = classifiers.copy(tmp_path / "alone")
    shutil.rmtree(bench.inputs / "teacher")
    finished = bench.succeed(spec_of([{"kind": "finetune", "of": "student", **LONG}]), 0, "alone")
    assert finished.last["summary"]["validation"]["accuracy"] > 0.9
    assert "student" in {path.name for path in finished.outputs.iterdir()}
    assert contents(finished.outputs)
