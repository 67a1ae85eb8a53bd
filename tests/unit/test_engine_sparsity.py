"""Zeros among a student's weights: which, and that they stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification as Classifier
from transformers.pytorch_utils import Conv1D

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from tests.engine_bench import FAST, Bench, make_spec
from worker.engine.blocks import Blocks, read_stream
from worker.engine.loading import load_language_model, load_tokenizer

TASK = {"kind": "causal_lm", "block_tokens": 32}
SPEC: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of the layers' linear maps, a row for each output."""
    stack = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    return {
        name: module.weight.T if isinstance(module, Conv1D) else module.weight
        for name, module in model.named_modules()
        if name.startswith(f"{stack}.") and isinstance(module, torch.nn.Linear | Conv1D)
    }


def run(root: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Returns matrices of a language model before and after, and the stage's summary."""
    bench = Bench(root).lay_language()
    student = {"kind": "teacher_layers", "keep": [0, 1, 2]}
    done = bench.succeed(make_spec([{"kind": "sparsify", **settings}], task=TASK, student=student), labels=[])
    models = [
        AutoModelForCausalLM.from_pretrained(folder) for folder in (bench.inputs / "teacher", done.outputs / "student")
    ]
    before, after = map(matrices, models)
    return before, after, done.last["summary"]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": {"kind": "magnitude"}},
        {"method": {"kind": "wanda"}},
        {"method": {"kind": "sparsegpt"}},
        {"method": {"kind": "sparsegpt"}, "pattern": "2:4"},
        {"method": {"kind": "wanda"}, "pattern": "4:8"},
    ],
    ids=str,
)
def test_half_of_the_weights_are_zero(settings: dict[str, Any], tmp_path: Path) -> None:
    before, after, summary = run(tmp_path, **settings)
    assert summary["zeros"] == pytest.approx(0.5, abs=0.002)
    assert summary["compressed_bytes"] < 0.85 * summary["stored_bytes"]
    for name, weight_OI in after.items():
        assert (weight_OI == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        if "pattern" in settings:
            n, m = map(int, settings["pattern"].split(":"))
            assert ((weight_OI != 0).reshape(-1, m).sum(1) == n).all()
        if settings["method"]["kind"] != "sparsegpt":
            assert torch.equal(weight_OI[weight_OI != 0], before[name][weight_OI != 0])


def test_over_all_layers_the_smallest_are_those_of_torch(tmp_path: Path) -> None:
    before, after, _ = run(tmp_path, method={"kind": "magnitude"}, scope="global", share=0.3)
    layers = {name: torch.nn.Linear(*weight.T.shape, bias=False) for name, weight in before.items()}
    for name, layer in layers.items():
        layer.weight.data = before[name].detach().clone(memory_format=torch.contiguous_format)
    pairs = [(layer, "weight") for layer in layers.values()]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.3)
    for name, layer in layers.items():
        assert torch.equal(after[name] != 0, layer.weight_mask.bool())


def test_wanda_compares_the_weights_of_a_row_by_what_they_hear(tmp_path: Path) -> None:
    """In the first layer, whose inputs no pruning has changed; by what the paper says, on a sample's own tokens."""
    before, after, _ = run(tmp_path, method={"kind": "wanda"})
    bench = Bench(tmp_path)
    model, tokenizer = load_language_model(bench.inputs / "teacher"), load_tokenizer(bench.inputs / "teacher")
    ids, learned = read_stream(bench.inputs / "data" / "train.jsonl", {"text": "text"}, tokenizer, is_chat=False)
    split = Blocks(ids, learned, 32).head(1024 // 32)
    name, heard = "transformer.h.0.attn.c_attn", []
    model.get_submodule(name).register_forward_hook(lambda _, inputs, __: heard.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in split.in_order(torch.device("cpu")):
            model(**batch.inputs)
    scores_OI = before[name].abs() * torch.cat(heard).norm(dim=0)
    kept_OK = scores_OI.topk(scores_OI.shape[1] // 2, dim=1).indices
    mask_OI = torch.zeros_like(scores_OI, dtype=torch.bool).scatter(1, kept_OK, value=True)
    assert ((after[name] != 0) == mask_OI).float().mean() > 0.995  # padding of the last block is heard once


def test_training_leaves_the_zeros(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {"kind": "sparsify", "share": 0.6},
        {"kind": "distill", **FAST, "average": 0.9},
        {"kind": "finetune", "of": "student", "epochs": 1},
    ]
    done = bench.succeed_all(make_spec(stages))
    found = [load_file(one.outputs / "student" / "model.safetensors") for one in done[2:]]
    names = list(matrices(Classifier.from_pretrained(done[2].outputs / "student")))
    for name in names:
        zeros = [weights[f"{name}.weight"] == 0 for weights in found]
        assert zeros[0].float().mean() > 0.55
        assert all(torch.equal(zeros[0], later) for later in zeros[1:])
        assert not torch.equal(found[0][f"{name}.weight"], found[1][f"{name}.weight"])
    lost, regained = (done[index].last["summary"]["validation"]["loss"] for index in (2, 3))
    assert regained < lost


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"pattern": "4:4"}, "pattern", "keeps none or all"),
        ({"pattern": "0:4"}, "pattern", "keeps none or all"),
        ({"pattern": "two"}, "pattern", "should match"),
        ({"pattern": "2:4", "scope": "row"}, "scope", "leave scope out"),
        ({"scope": "global"}, "scope", "compares weights of one matrix"),
        ({"share": 1.0}, "share", "less than 1"),
    ],
)
def test_what_makes_no_sense_is_said_at_submit(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(SPEC | {"stages": [{"kind": "sparsify", **settings}]})
    [detail] = caught.value.details
    assert detail["field"] == f"stages.0.{field}"
    assert words in detail["message"]


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    finished = bench.run(make_spec([{"kind": "sparsify", "pattern": "3:7"}]))
    assert finished.last["type"] == "error"
    assert "do not divide the 32 inputs" in finished.last["message"]
