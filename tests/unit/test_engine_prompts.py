"""Prompts in training: what is kept against stock `peft` on the model as it was, and what cannot be."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts, read_facts
from tests.engine_bench import FAST, Bench, contents, make_spec
from worker.engine.loading import load_classifier, load_language_model

PROMPT = {"kind": "prompt", "tokens": 6}
LEARN = {"kind": "finetune", "of": "student", **FAST, "learning_rate": 3e-2, "max_length": 48, "adapter": PROMPT}
BASE = {"kind": "pretrained", "model": "small"}
TEXTS = ["please my parcel is late", "refund"]


def lay_base(bench: Bench) -> Bench:
    (bench.inputs / "teacher").rename(bench.inputs / "base")
    return bench


def test_a_prompt_is_kept_beside_the_model_and_measured(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    learned = bench.succeed(make_spec([{"kind": "finetune", **FAST}]), 0, "base").outputs / "teacher"
    trunk = AutoModelForSequenceClassification.from_pretrained(learned).base_model  # a random one hears no prompt
    shutil.copytree(bench.inputs / "teacher", bench.inputs / "base")
    trunk.save_pretrained(bench.inputs / "base")
    finished = bench.succeed(make_spec([LEARN], student=BASE))
    assert finished.last["summary"]["validation"]["accuracy"] > 0.8
    folder, alone = finished.outputs / "student", finished.outputs / "adapter"
    assert {path.name for path in alone.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "config.json").exists()  # which stock transformers would load without the prompt
    kept = load_file(alone / "adapter_model.safetensors")
    assert sum(x.numel() for x in kept.values()) == finished.last["summary"]["num_trained"]
    assert kept["prompt_embeddings"].shape == (6, 32)
    given, stored = (load_file(path / "model.safetensors") for path in (bench.inputs / "base", folder / "base"))
    assert all(torch.equal(x, stored[f"bert.{name}"]) for name, x in given.items() if "pooler" not in name)
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    stock = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(folder / "base"), alone).eval()
    ours = load_classifier(folder, ["delivery", "login", "refund"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)
    bench.adopt(finished, 0, "finetune")
    rows = bench.succeed(make_spec([LEARN, {"kind": "evaluate", "latency_samples": 10}], student=BASE), 1).last
    found = {row["name"]: row for row in rows["summary"]["models"]}
    assert found["student"]["accuracy"] > 0.8 > found["teacher"]["accuracy"]


def test_a_run_with_a_prompt_that_was_interrupted_ends_with_the_same_bytes(tmp_path: Path) -> None:
    bench = lay_base(Bench(tmp_path).lay())
    spec = make_spec([{**LEARN, "epochs": 2, "average": 0.9}], student=BASE)
    whole = bench.succeed(spec, 0, "whole", checkpoint_s=0)
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", checkpoint_s=0), 4, "kill")
    again = bench.succeed(spec, 0, "again", checkpoint=str(found[-1]))
    assert contents(again.outputs) == contents(whole.outputs)


def test_a_language_model_learns_a_prompt(tmp_path: Path) -> None:
    bench = lay_base(Bench(tmp_path).lay_language())
    learn = {"kind": "finetune", "of": "student", "epochs": 10, "learning_rate": 3e-2, "batch_size": 4}
    task = {"kind": "causal_lm", "block_tokens": 32}
    spec = make_spec([learn | {"adapter": PROMPT}], task=task, student=BASE)
    finished = bench.succeed(spec, labels=[])
    losses = [value for _, value in finished.series("loss/total")]
    assert losses[-1] < losses[0]
    folder = finished.outputs / "student"
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), finished.outputs / "adapter"
    ).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected_BTV = stock(input_ids=ids).logits[:, PROMPT["tokens"] :]
        torch.testing.assert_close(load_language_model(folder).eval()(input_ids=ids).logits, expected_BTV)


@pytest.mark.parametrize(
    ("stages", "changes", "field", "hint"),
    [
        ([{"kind": "finetune", "adapter": PROMPT}, {"kind": "distill"}], {}, "0.adapter", "use student kind 'pretr"),
        ([LEARN, {"kind": "prune", "num_layers": 1}], {}, "0.adapter", "needs the student whole"),
        ([LEARN, {"kind": "distill"}], {}, "0.adapter", "needs the student whole"),
        ([LEARN, {"kind": "distill", "adapter": PROMPT}], {}, "1.adapter", "has one already"),
        (
            [LEARN, {"kind": "export", "formats": [{"kind": "onnx"}]}],
            {},
            "1.formats.0",
            "use an adapter such as 'lora'",
        ),
        (
            [{"kind": "distill", "adapter": PROMPT, "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]}],
            {"student": BASE},
            "0.adapter.kind",
            "its layers fit those of none",
        ),
        (
            [{"kind": "finetune", "adapter": PROMPT}, {"kind": "generate"}],
            {"student": BASE, "task": {"kind": "causal_lm"}},
            "0.adapter",
            "'generate', needs the teacher whole",
        ),
        ([{"kind": "finetune", "adapter": {"kind": "prompt", "tokens": 0}}], {}, "0.adapter.tokens", "greater than"),
    ],
)
def test_specs_that_cannot_be(stages: list[dict[str, Any]], changes: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec(stages, **changes)
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(f"stages.{field}", ""), details


@pytest.mark.parametrize(
    ("model_type", "num_positions", "max_length", "field", "hint"),
    [
        ("bert", 64, 58, None, ""),
        ("bert", 64, 59, "adapter.tokens", "the student has 64 positions, and 59 are for the text"),
        ("bert", None, 4096, None, ""),
        ("gpt2", 64, 16, "adapter.kind", "'gpt2' takes no prompt here; known: bert, roberta"),
        ("electra", 512, 16, "adapter.kind", "or use 'lora'"),
    ],
)
def test_what_takes_no_prompt_is_told_at_submit(
    model_type: str, num_positions: int | None, max_length: int, field: str | None, hint: str
) -> None:
    spec = load_spec(make_spec([{**LEARN, "max_length": max_length}], student=BASE))
    start = ModelFacts(model_type=model_type, num_layers=3, num_positions=num_positions)
    problems = spec.stages[0].check_model(spec, start)
    assert [problem.field for problem in problems] == ([field] if field else [])
    assert all(hint in problem.message for problem in problems)


def test_positions_are_those_that_texts_have() -> None:
    """RoBERTa's table has two rows for places that no token takes."""
    assert read_facts({"model_type": "bert", "max_position_embeddings": 512}).num_positions == 512
    roberta = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert read_facts(roberta).num_positions == 512
    assert read_facts({"model_type": "gpt2", "n_positions": 64}).num_positions == 64
