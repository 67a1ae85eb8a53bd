"""Adapters in training: what comes out against the library `peft`, and what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.methods import ModelFacts
from tests import pico
from tests.engine_bench import FAST, LABELS, Bench, contents, make_spec
from worker.engine.adapters import find_head, find_matrices
from worker.engine.loading import load_classifier, load_language_model
from worker.methods.sharing.lora import Lora

KINDS = [
    {"kind": "lora", "rank": 4},
    {"kind": "dora", "rank": 4, "layers": [0, 2]},
    {"kind": "ia3"},
    {"kind": "lora", "rank": 2, "parts": "attention"},
]
TEXT = "please my parcel is late"


def logits_of(model: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter["kind"] + adapter.get("parts", ""))
def test_what_is_merged_is_what_peft_reads(adapter: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    learn = {"kind": "finetune", **FAST, "epochs": 24, "learning_rate": 3e-3, "adapter": adapter}
    finished = bench.succeed(make_spec([learn]))
    if adapter["kind"] != "ia3":  # which only scales what this model, whose base is random, says already
        assert finished.last["summary"]["validation"]["accuracy"] > 0.8
    merged = AutoModelForSequenceClassification.from_pretrained(finished.outputs / "teacher")
    base = load_classifier(bench.inputs / "teacher", LABELS)
    apart = PeftModel.from_pretrained(base, finished.outputs / "adapter")
    torch.testing.assert_close(
        logits_of(merged, finished.outputs / "teacher"),
        logits_of(apart, finished.outputs / "teacher"),
        atol=1e-5,
        rtol=0,
    )
    before = load_file(bench.inputs / "teacher" / "model.safetensors")
    after = load_file(finished.outputs / "teacher" / "model.safetensors")
    changed = {name for name, x in before.items() if not torch.equal(x, after[f"bert.{name}"])}
    where = "attention" if adapter.get("parts") == "attention" else ""
    layers = adapter.get("layers", [0, 1, 2])
    assert {name for name in changed if "pooler" not in name} == {
        name
        for name in before
        if any(name.startswith(f"encoder.layer.{layer}.") for layer in layers)
        and before[name].ndim == 2
        and (not where or ".attention." in name)
    }
    kept = load_file(finished.outputs / "adapter" / "adapter_model.safetensors")
    assert sum(x.numel() for x in kept.values()) == finished.last["summary"]["num_trained"]
    assert {path.name for path in (finished.outputs / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_student_is_distilled_by_an_adapter_and_goes_on_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    bench.adopt(bench.succeed(make_spec([{"kind": "finetune", **FAST}])), 0, "finetune")
    learn = {"kind": "distill", **FAST, "epochs": 4, "learning_rate": 1e-2, "adapter": {"kind": "lora"}, "average": 0.9}
    spec = make_spec([learn])
    whole = bench.succeed(spec, 0, "whole", checkpoint_s=0)
    assert whole.last["summary"]["validation"]["accuracy"] > 0.8
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", checkpoint_s=0), 4, "kill")
    again = bench.succeed(spec, 0, "again", checkpoint=str(found[-1]))
    assert contents(again.outputs) == contents(whole.outputs)


def test_a_language_models_matrices_are_found(tmp_path: Path) -> None:
    model = load_language_model(pico.write_language_model(tmp_path))
    assert find_head(model) == []
    assert find_matrices(model, Lora(layers=[1])) == [
        f"transformer.h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert find_matrices(model, Lora(layers=[1], parts="feed_forward")) == [
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]


def test_a_language_model_learns_by_an_adapter(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    learn = {"kind": "finetune", "epochs": 10, "learning_rate": 2e-2, "batch_size": 4, "adapter": {"kind": "lora"}}
    task = {"kind": "causal_lm", "block_tokens": 32}
    finished = bench.succeed(make_spec([learn], task=task), labels=[])
    losses = [value for _, value in finished.series("loss/total")]
    assert losses[-1] < 0.95 * losses[0]
    before, after = (
        load_file(folder / "model.safetensors") for folder in (bench.inputs / "teacher", finished.outputs / "teacher")
    )
    assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])


def test_a_layer_that_is_not_there_is_told_by_the_stage_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    finished = bench.run(make_spec([{"kind": "finetune", **FAST, "adapter": {"kind": "lora", "layers": [3]}}]))
    assert finished.last["reason"] == "spec_invalid"
    assert finished.last["message"] == "Layer 3 gets no adapter: the model has 3 layers, counted from 0."


@pytest.mark.parametrize(
    ("stages", "field", "hint"),
    [
        ([{"kind": "finetune", "adapter": {"kind": "lora", "rank": 0}}], "stages.0.adapter.rank", "greater than or"),
        (
            [{"kind": "finetune", "adapter": {"kind": "prefix"}}],
            "stages.0.adapter.kind",
            "known: dora, ia3, lora, prompt",
        ),
        (
            [{"kind": "quantize"}, {"kind": "distill", "adapter": {"kind": "lora"}}],
            "stages.1.adapter",
            "'quantize' has chosen single weights",
        ),
        (
            [{"kind": "sparsify"}, {"kind": "distill", "adapter": {"kind": "lora"}}],
            "stages.1.adapter",
            "'sparsify' has chosen single weights",
        ),
    ],
)
def test_specs_that_cannot_be(stages: list[dict[str, Any]], field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec(stages)
    assert {detail["field"] for detail in caught.value.details} >= {field}
    assert any(hint in detail["message"] for detail in caught.value.details), json.dumps(caught.value.details)


def test_a_layer_that_is_not_there_is_told_at_submit() -> None:
    learn = [{"kind": kind, "adapter": {"kind": "lora", "layers": [1, 4]}} for kind in ("finetune", "distill")]
    spec = load_spec(make_spec(learn))
    start = ModelFacts(model_type="bert", num_layers=6)
    [problem] = spec.stages[1].check_model(spec, start)
    assert (problem.field, problem.message) == (
        "adapter.layers",
        "there is no layer 4; the student has 2, counted from 0",
    )
    assert spec.stages[0].check_model(spec, start) == []
