"""Folders of transformers in half precision, read by its stock classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import AutoModelForSequenceClassification as Classifier

from core.errors import StageFailed
from core.models.checking import check_model
from tests.engine_bench import FAST, LABELS, Bench, contents, make_spec
from tests.unit.test_engine_changes import read_sizes
from worker.engine.blocks import Blocks, read_stream
from worker.engine.loading import load_tokenizer, save_classifier
from worker.methods.exporters.safetensors import Safetensors

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TASK = {"kind": "causal_lm", "block_tokens": 32}
WHOLE = {"kind": "teacher_layers", "keep": [0, 1, 2]}
STAGES = [
    {"kind": "finetune", "of": "student", **FAST},
    {"kind": "export", "formats": [{"kind": "safetensors", "dtype": "bfloat16"}]},
    {"kind": "evaluate", "latency_samples": 10},
]
TEXTS = ["my parcel is late", "please help with the password reset code now", "refund"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A job whose student has learned its task."""
    bench = Bench(tmp_path_factory.mktemp("learned")).lay()
    bench.succeed_all(make_spec(STAGES[:1]))
    return bench


def export(bench: Bench, folder: Path, **settings: Any) -> dict[str, float]:
    """Writes the student of a job in a folder, and returns what the check measured."""
    with bench.surround(make_spec(STAGES), 1, folder.name) as ctx:
        return Safetensors(**settings).build(ctx)(folder)


def answer(model: PreTrainedModel, folder: Path) -> Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_folder_in_half_precision_is_half_as_large_and_loads_as_it_is(
    dtype: str, learned: Bench, tmp_path: Path
) -> None:
    bench, folder, student = learned.copy(tmp_path / "job"), tmp_path / "form", learned.inputs / "student"
    measured = [export(bench, tmp_path / name, dtype=dtype) for name in ("form", "again")]
    assert measured[0]["agreement"] == 1
    assert contents(tmp_path / "again") == contents(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    sizes, whole = (read_sizes(one / "model.safetensors") for one in (folder, student))
    assert {name: 2 * size for name, size in sizes.items()} == whole
    again, info = Classifier.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = Classifier.from_pretrained(student)
    assert again.dtype == HALVES[dtype]
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight.to(HALVES[dtype])), name
    expected, found = answer(model, student), answer(again, folder)
    step = torch.finfo(HALVES[dtype]).eps * expected.abs().max()
    assert 0 < (found - expected).abs().max() < 4 * step
    assert 0 < measured[0]["max_logit_difference"] < 8 * step
    assert Safetensors(dtype=dtype).bytes_per_parameter == 2 * Safetensors().bytes_per_parameter / 4


def lay_changed(learned: Bench, root: Path, change: Callable[[PreTrainedModel], object]) -> Bench:
    """Returns a job whose student has other weights."""
    bench = learned.copy(root)
    folder = bench.inputs / "student"
    model, tokenizer = Classifier.from_pretrained(folder), load_tokenizer(folder)
    with torch.no_grad():
        change(model)
    for path in folder.iterdir():
        path.unlink()
    save_classifier(model, tokenizer, LABELS, folder)
    return bench


def enlarge_a_weight(model: PreTrainedModel) -> None:
    model.bert.embeddings.position_embeddings.weight[63, 0] = 65_600  # of a place that no text has


def enlarge_logits(model: PreTrainedModel) -> None:
    model.classifier.weight.mul_(30_000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            enlarge_a_weight,
            "'bert.embeddings.position_embeddings.weight' has numbers above 65,504, the largest of 'float16'",
        ),
        (enlarge_logits, "logits of safetensors are not finite"),
    ],
)
def test_what_float16_has_no_room_for_is_refused_and_bfloat16_holds_it(
    change: Callable[[PreTrainedModel], object], words: str, learned: Bench, tmp_path: Path
) -> None:
    bench = lay_changed(learned, tmp_path / "job", change)
    with pytest.raises(StageFailed) as caught:
        export(bench, tmp_path / "float16", dtype="float16")
    assert caught.value.reason == "export_unsupported"
    assert words in caught.value.message
    assert "'bfloat16'" in caught.value.suggestion
    assert export(bench, tmp_path / "bfloat16", dtype="bfloat16")["agreement"] == 1


def bring_together(model: PreTrainedModel) -> None:
    """Leaves between the classes less than bfloat16 can tell, but for the weights themselves."""
    weight_CD = model.classifier.weight
    weight_CD.copy_(weight_CD.mean(0) + 1e-4 * (weight_CD - weight_CD.mean(0)))
    model.classifier.bias.fill_(1)


def test_labels_that_half_precision_turns_are_not_published_and_count_where_they_are(
    learned: Bench, tmp_path: Path
) -> None:
    bench = lay_changed(learned, tmp_path / "job", bring_together)
    with pytest.raises(StageFailed) as caught:
        export(bench, tmp_path / "form", dtype="bfloat16")
    assert caught.value.reason == "goal_missed"
    assert "min_agreement is 95.00%" in caught.value.message
    export(bench, bench.inputs / "safetensors", dtype="bfloat16", min_agreement=0.01)
    rows = {row["name"]: row for row in bench.succeed(make_spec(STAGES), 2).last["summary"]["models"]}
    assert rows["student"]["accuracy"] > 0.9
    assert rows["safetensors"]["accuracy"] < 0.6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stage", [{"kind": "quantize", "bits": 4, "group": 16}, {"kind": "sparsify"}], ids=str)
def test_a_language_model_is_written_and_measured_in_half_precision(
    stage: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    stages = [
        {"kind": "finetune", **FAST, "epochs": 2},
        stage,
        {"kind": "export", "formats": [{"kind": "safetensors", "dtype": dtype}]},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    bench = Bench(tmp_path).lay_language()
    done = bench.succeed_all(make_spec(stages, task=TASK, student=WHOLE), labels=[])
    student, folder = bench.inputs / "student", bench.inputs / "safetensors"
    sizes, whole = (read_sizes(one / "model.safetensors") for one in (folder, student))
    assert {name: 2 * size for name, size in sizes.items()} == whole
    tensors = load_file(folder / "model.safetensors")
    for name, weight in load_file(student / "model.safetensors").items():
        assert torch.equal(tensors[name], weight.to(HALVES[dtype])), name
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert again.lm_head.weight is again.transformer.wte.weight
    assert getattr(again.config, "keeps_zeros", False) == (stage["kind"] == "sparsify")
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    ids, is_learned = read_stream(
        bench.inputs / "data" / "test.jsonl", {"text": "text"}, load_tokenizer(folder), is_chat=False
    )
    losses = []
    for batch in Blocks(ids, is_learned, 32).in_order(torch.device("cpu")):
        with torch.no_grad():
            logits_NV = again(input_ids=batch.inputs["input_ids"]).logits[batch.is_row].float()
        losses.append(cross_entropy(logits_NV, batch.row_labels, reduction="none"))
    assert rows["safetensors"]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert 0 < abs(rows["safetensors"]["loss"] - rows["student"]["loss"]) < 0.01
    assert rows["safetensors"]["size_bytes"] < rows["student"]["size_bytes"] - sum(sizes.values()) + 1000


def test_a_classifier_in_half_precision_is_measured_and_trained_on_by_another_job(
    learned: Bench, tmp_path: Path
) -> None:
    bench, spec = learned.copy(tmp_path / "first"), make_spec(STAGES)
    bench.adopt(bench.succeed(spec, 1), 1, "export")
    rows = {row["name"]: row for row in bench.succeed(spec, 2).last["summary"]["models"]}
    assert rows["safetensors"]["accuracy"] == pytest.approx(rows["student"]["accuracy"], abs=0.02)
    assert rows["safetensors"]["num_parameters"] == rows["student"]["num_parameters"]
    form = bench.inputs / "safetensors"
    facts = check_model({path.name: path for path in form.iterdir()})
    assert facts.num_parameters == rows["student"]["num_parameters"]
    bench = Bench(tmp_path / "second").lay()
    form.rename(bench.inputs / "base")
    learn = {"kind": "finetune", "of": "student", **FAST, "epochs": 1, "learning_rate": 1e-5}
    other = bench.succeed(make_spec([learn], student={"kind": "pretrained", "model": "half"}))
    assert other.last["summary"]["validation"]["accuracy"] > 0.9
    trained = Classifier.from_pretrained(other.outputs / "student")
    assert trained.dtype == torch.float32
    assert not torch.equal(trained.classifier.weight, trained.classifier.weight.bfloat16().float())
