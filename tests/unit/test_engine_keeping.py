"""Layers of a teacher that were kept: against stock transformers, against the teacher itself, and in real stages."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from app.jobs.resolving import check_models
from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from core.losses import FeatureLoss
from core.models.facts import ModelFacts
from core.registry import list_methods
from tests import pico
from tests.engine_bench import Bench, contents, finished_before, make_spec
from worker.child import ForkServer
from worker.engine.data import Encoded
from worker.engine.features import Features
from worker.engine.inference import predict_logits
from worker.engine.keeping import KeptLayers, Recorder
from worker.engine.students import keep_layers
from worker.engine.watching import Watched

LOSSES = {kind: loss for kind, loss in list_methods("losses").items() if issubclass(loss, FeatureLoss)}
SIZES = {"vocab_size": 60, "num_labels": 3, "pad_token_id": 0}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
CONFIGS: list[PreTrainedConfig] = [
    BertConfig(**SIZES, **BERT),
    DistilBertConfig(**SIZES, dim=32, hidden_dim=48, n_heads=4, n_layers=4),
    GPT2Config(**SIZES, n_embd=32, n_layer=4, n_head=4),
    LlamaConfig(**SIZES, **BERT, num_key_value_heads=2),
]
LENGTHS = [6, 3, 9, 1, 3, 12, 5]
PARTS = ("first_token", "hidden", "query", "key", "value")
CPU = torch.device("cpu")
HALF = 2.0**-11  # what a number loses in float16


def make_split() -> Encoded:
    """Texts of several lengths, two of which are the same."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, 60, length, dtype=np.int32) for length in LENGTHS]
    ids[4] = ids[1]
    columns = {"input_ids": ids, "attention_mask": [np.ones_like(row) for row in ids]}
    return Encoded(columns, {"input_ids": 0, "attention_mask": 0}, torch.zeros(len(ids), dtype=torch.long), 16, 0, "")


def make_models(config: PreTrainedConfig) -> tuple[Any, Any]:
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    teacher.has_new_head = False
    student = keep_layers(teacher, [0, 2]).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student, teacher


def keep(teacher: Any, split: Encoded, folder: Path, layers: dict[Any, list[int]]) -> KeptLayers:
    recorder = Recorder(SimpleNamespace(scratch_dir=folder), teacher, split, layers)  # type: ignore[arg-type]
    recorder.begin(0, len(split))
    predict_logits(teacher, split, lambda: None, 3)
    recorder.save(folder)
    return KeptLayers(folder, CPU)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_kept_states_are_those_of_stock_transformers(config: PreTrainedConfig, tmp_path: Path) -> None:
    _, teacher = make_models(config)
    split = make_split()
    keep(teacher, split, tmp_path, {"hidden": [0, 2], "first_token": [-2]})
    found = load_file(tmp_path / "layers-00000.safetensors")
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "hidden.0": (sum(LENGTHS), 32),
        "hidden.2": (sum(LENGTHS), 32),
        "first_token.2": (len(LENGTHS), 32),
    }
    for text in (0, 1, 2, 3, 5, 6):
        start = sum(LENGTHS[:text])
        with torch.no_grad():
            stock = teacher(**split.single(text), output_hidden_states=True).hidden_states
        for layer in (0, 2):
            rows = found[f"hidden.{layer}"][start : start + LENGTHS[text]]
            torch.testing.assert_close(rows.float(), stock[layer + 1][0], rtol=2 * HALF, atol=1e-5)
        torch.testing.assert_close(found["first_token.2"][text].float(), stock[3][0, 0], rtol=2 * HALF, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_losses_and_gradients_are_those_beside_the_teacher(kind: str, config: PreTrainedConfig, tmp_path: Path) -> None:
    student, teacher = make_models(config)
    split, loss = make_split(), LOSSES[kind].model_validate({"kind": kind, "layers": [[0, 1], [1, 3]]})
    kept = keep(teacher, split, tmp_path, {part: [1, 3] for part in loss.needs})
    kept.find(split)
    found = []
    context: Any = SimpleNamespace(spec=SimpleNamespace(task=SimpleNamespace(kind="text_classification")))
    for layers in (Watched(teacher), kept):
        features = Features(context, [(kind, loss)], Watched(student), layers)
        batch = split.batch(np.array([5, 0, 3, 4]), CPU)  # padded otherwise than when they were kept
        student.zero_grad()
        student(**batch.inputs)
        with torch.no_grad():
            teacher(**batch.inputs)
        kept.see(batch.inputs)
        value, _ = features.compare(batch, batch)
        value.backward()
        found.append((value.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])))
    (online, online_P), (offline, offline_P) = found
    assert offline == pytest.approx(online, rel=1e-3)
    assert torch.linalg.vector_norm(offline_P - online_P) < 2e-3 * torch.linalg.vector_norm(online_P)
    assert torch.linalg.vector_norm(online_P) > 0


def test_numbers_too_large_for_16_bits_are_told(tmp_path: Path) -> None:
    _, teacher = make_models(CONFIGS[0])
    with torch.no_grad():
        teacher.bert.encoder.layer[1].attention.self.query.bias.fill_(1e5)
    with pytest.raises(StageFailed, match="'query' of the teacher's layer 1 has numbers that 16 bits cannot hold"):
        keep(teacher, make_split(), tmp_path, {"query": [1]})


def test_layers_that_are_not_there_are_told(tmp_path: Path) -> None:
    _, teacher = make_models(CONFIGS[0])
    with pytest.raises(StageFailed, match=r"layers\.hidden names layer 4; the teacher has 4 layers"):
        keep(teacher, make_split(), tmp_path, {"hidden": [4]})


def test_a_teacher_without_an_attention_mask_is_told(tmp_path: Path) -> None:
    _, teacher = make_models(CONFIGS[0])
    split = make_split()
    del split.columns["attention_mask"]
    with pytest.raises(StageFailed, match="together with their padding"):
        keep(teacher, split, tmp_path, {"hidden": [0]})


ALL = [{"kind": kind, "layers": [[0, 2]]} for kind in sorted(LOSSES)]
TRAIN = {"kind": "distill", "epochs": 2, "learning_rate": 2e-3, "batch_size": 16, "deletion_probability": 0.0}
ANSWER = {"kind": "answer", "layers": {part: [-1] for part in PARTS}}
SMALL = {"kind": "pretrained", "model": "small"}


def spec_of(losses: list[dict[str, Any]], answer: dict[str, Any] = ANSWER, **changes: Any) -> dict[str, Any]:
    return make_spec([answer, {**TRAIN, "losses": losses}], student=SMALL, **changes)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A teacher that has answered, beside another model with its tokens."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    pico.write_model(bench.inputs / "base", num_layers=1)
    bench.adopt(bench.succeed(spec_of(ALL), 0), 0, "answer")
    return bench


def test_a_student_learns_from_layers_without_the_teacher(bench: Bench, tmp_path: Path) -> None:
    """The one run has the answers and no teacher, the other the teacher and no answers."""
    spec = spec_of([{"kind": "forward_kl"}, *ALL])
    kept, online = bench.copy(tmp_path / "kept"), bench.copy(tmp_path / "online")
    shutil.rmtree(kept.inputs / "teacher")
    shutil.rmtree(online.inputs / "answers")
    offline, beside = kept.succeed(spec, 1), online.succeed(spec, 1)
    for kind in LOSSES:
        here, there = ([value for _, value in run.series(f"loss/{kind}")] for run in (offline, beside))
        assert here[0] == pytest.approx(there[0], rel=1e-3)
        assert here == pytest.approx(there, rel=0.02, abs=1e-6)
    spec["stages"][1]["deletion_probability"] = 0.5  # of which nothing comes: what was kept is of the texts as they are
    found, _ = kept.interrupt(kept.write_order(spec, 1, "killed", checkpoint_s=0), 20, "kill")
    again = kept.succeed(spec, 1, "again", checkpoint=str(found[-1]))
    assert "going on from step" in again.log
    assert contents(again.outputs) == contents(offline.outputs)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_classifier_goes_on_answering_from_a_checkpoint(bench: Bench, how: str, tmp_path: Path) -> None:
    bench, spec = bench.copy(tmp_path / "bench"), spec_of(ALL)
    path = bench.inputs / "data" / "train.jsonl"
    path.write_text(path.read_text() * 8)  # three pieces
    whole = bench.succeed(spec, 0, "whole")
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", checkpoint_s=0), 1, how)
    again = bench.succeed(spec, 0, "on", checkpoint=str(found[0]))
    assert "going on from text 512 of train" in again.log
    assert contents(again.outputs) == contents(whole.outputs)


def test_a_summary_tells_how_large_the_layers_are(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "bench")
    summary = bench.succeed(spec_of(ALL), 0, "again").last["summary"]
    folder = bench.root / "again" / "out" / "answers"
    files = list(folder.iterdir())
    assert sorted(path.name for path in files) == ["answers.safetensors", "layers-00000.safetensors"]
    assert summary["size_bytes"] == sum(path.stat().st_size for path in files)
    assert contents(bench.inputs / "answers") == contents(folder)


def test_layers_that_were_not_kept_are_told(bench: Bench) -> None:
    finished = bench.run(spec_of([{"kind": "hidden_mse", "layers": [[0, 1]]}]), 1, "lacking")
    assert finished.last["reason"] == "spec_invalid"
    assert "lack what the losses on layers compare: 'hidden' of layer 1" in finished.last["message"]
    assert '{"hidden": [1]}' in finished.last["suggestion"]


@pytest.mark.parametrize("change", ["max_length", "tokenizer"])
def test_layers_for_other_tokens_are_refused(bench: Bench, change: str, tmp_path: Path) -> None:
    bench, spec = bench.copy(tmp_path / "bench"), spec_of(ALL)
    if change == "max_length":
        spec["stages"][1]["max_length"] = 5
    else:
        shutil.rmtree(bench.inputs / "base")
        pico.write_model(bench.inputs / "base", is_reversed=True)
    finished = bench.run(spec, 1)
    assert finished.last["reason"] == "vocab_incompatible"
    assert "kept for other tokens than the student reads" in finished.last["message"]
    assert "max_length" in finished.last["suggestion"]


def test_what_is_to_be_kept_is_told_at_submit() -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec([{"kind": "answer"}, {**TRAIN, "losses": [{"kind": "forward_kl"}, {"kind": "relations"}]}])
    [found] = caught.value.details
    assert found["field"] == "stages.1.losses.1"
    assert "have stages.0.layers hold query, key, value" in found["message"]


@pytest.mark.parametrize(("layer", "is_there"), [(-3, True), (2, True), (-4, False), (3, False)])
def test_layers_that_the_teacher_lacks_are_told_at_submit(layer: int, is_there: bool) -> None:
    spec = load_spec(make_spec([{"kind": "answer", "layers": {"hidden": [layer]}}, {"kind": "distill"}], student=SMALL))
    facts = {
        "teacher": ModelFacts(model_type="bert", num_layers=3),
        "base": ModelFacts(model_type="bert", num_layers=9),
    }
    found = [(problem["field"], problem["message"]) for problem in check_models(spec, facts)]
    why = f"names layer {layer}; the teacher has 3 layers, counted from 0; name some of these"
    assert found == ([] if is_there else [("stages.0.layers.hidden", why)])


@pytest.mark.parametrize(("top_k", "rest"), [(59, "samples"), (60, "together"), (60, "samples")])
def test_a_teacher_of_few_tokens_is_told_at_submit(top_k: int, rest: str) -> None:
    stages = [{"kind": "answer", "top_k": top_k, "rest": rest}, {"kind": "distill"}]
    spec = load_spec(make_spec(stages, student=SMALL, task={"kind": "causal_lm"}))
    facts = ModelFacts(model_type="gpt2", num_layers=3, vocab_size=60)
    found = [
        (problem["field"], problem["message"]) for problem in check_models(spec, {"teacher": facts, "base": facts})
    ]
    why = "the teacher has 60 tokens, and none is left to draw; choose fewer, or rest 'together'"
    assert found == ([("stages.0.top_k", why)] if (top_k, rest) == (60, "samples") else [])


def test_a_teacher_that_only_answers_has_no_layers_to_keep() -> None:
    teacher = {"kind": "label_space", "model": "big", "prompt": "{text}"}
    with pytest.raises(SpecInvalid) as caught:
        make_spec([ANSWER, {"kind": "distill"}], teacher=teacher, student=SMALL)
    assert caught.value.details[0]["field"] == "stages.0.layers"


def write_tags(folder: Path) -> list[str]:
    """Turns each word of the texts into one to be tagged, and puts a text before them of which nothing is read."""
    kinds = {word: kind for kind, words in pico.WORDS.items() for word in words.split()}
    for path in folder.iterdir():
        texts = [json.loads(line)["text"].split() for line in path.read_text().splitlines()]
        rows = [{"tokens": words, "tags": [f"B-{kinds[w]}" if w in kinds else "O" for w in words]} for words in texts]
        rows.insert(0, {"tokens": ["\u200b"], "tags": ["O"]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted({"O", *(f"B-{kind}" for kind in pico.WORDS)})


def write_labels(folder: Path) -> list[str]:
    """Gives each text none or one label."""
    for path in folder.iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{"text": row["text"], "labels": [row["label"]] if row["label"] > "e" else []} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["login", "refund"]


@pytest.mark.parametrize(
    ("kind", "write"),
    [("token_classification", write_tags), ("multi_label_classification", write_labels)],
    ids=["tags", "labels"],
)
def test_tasks_with_other_rows_than_texts_find_their_layers(kind: str, write: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "kept").lay()
    labels = write(bench.inputs / "data")
    pico.write_model(bench.inputs / "base", num_layers=1)
    spec = spec_of(
        [{"kind": "patient", "layers": "last"}, {"kind": "hidden_mse", "layers": "last"}], task={"kind": kind}
    )
    beside = bench.copy(tmp_path / "online").succeed(spec, 1, labels=labels)
    bench.adopt(bench.succeed(spec, 0, labels=labels), 0, "answer")
    shutil.rmtree(bench.inputs / "teacher")
    offline = bench.succeed(spec, 1, labels=labels)
    for loss in ("patient", "hidden_mse"):
        here, there = ([value for _, value in run.series(f"loss/{loss}")] for run in (offline, beside))
        assert here == pytest.approx(there, rel=0.02)


def test_layers_of_a_language_model_are_kept_over_a_crash(small_shards: ForkServer, tmp_path: Path) -> None:
    """Its weights are away while the student learns; what its tokens are must still be there.

    Some blocks are alike; of what is kept, three are in a file.
    """
    bench = Bench(tmp_path / "kept", small_shards).lay_language()
    path = bench.inputs / "data" / "train.jsonl"
    path.write_text(json.dumps({"text": " ".join(["login"] * 400)}) + "\n" + path.read_text())
    pico.write_language_model(bench.inputs / "base", num_layers=1)
    losses = [{"kind": "forward_kl", "temperature": 1.0}, {"kind": "relations", "layers": "last"}]
    losses.append({"kind": "patient", "layers": "last"})
    answer = {**ANSWER, "top_k": 100, "layers": {part: [-1] for part in PARTS if part != "hidden"}}
    spec = spec_of(losses, answer, task={"kind": "causal_lm", "block_tokens": 32})
    beside = bench.copy(tmp_path / "online").succeed(spec, 1, labels=[])
    answered = bench.succeed(spec, 0, labels=[])
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", labels=[], checkpoint_s=0), 8, "kill")
    assert len(contents(finished_before(found[-1]))) == 4
    again = bench.succeed(spec, 0, "on", labels=[], checkpoint=str(found[-1]))
    assert "going on from block 8" in again.log
    assert contents(again.outputs) == contents(answered.outputs)
    bench.adopt(answered, 0, "answer")
    (bench.inputs / "teacher" / "model.safetensors").unlink()
    offline = bench.succeed(spec, 1, labels=[])
    for loss in ("forward_kl", "relations", "patient"):
        here, there = ([value for _, value in run.series(f"loss/{loss}")] for run in (offline, beside))
        assert here == pytest.approx(there, rel=0.02, abs=1e-4)
