"""What counts when a model is pruned, and that a pruned model is the whole one with the rest masked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import PreTrainedConfig

from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from core.methods import list_methods
from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_models import CONFIGS, make
from tests.unit.test_engine_narrowing import KNOWN, Sample, context, cut, logits, parts_of, weight_of
from worker.engine.importance import Site, rank_blocks, watch
from worker.methods.stages.prune import Prune

TAYLOR = {"kind": "taylor"}
KINDS = sorted(list_methods("pruning"))
BERT = CONFIGS[0]
each_kind = pytest.mark.parametrize("kind", KINDS)


def look(model: torch.nn.Module, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns how much each head of each layer counts, and each neuron."""
    by, parts = list_methods("pruning")[kind](), parts_of(model)
    heads, neurons = {part.out: Site(part.out, 16) for part in parts}, {part.down: Site(part.down, 1) for part in parts}
    watch(context(), model, heads | neurons, by, Sample())  # type: ignore[arg-type]
    return rank_blocks(context(), heads.values(), by), rank_blocks(context(), neurons.values(), by)  # type: ignore[arg-type]


def inputs_of(model: torch.nn.Module, module: torch.nn.Module) -> torch.Tensor:
    """Returns what a linear map gets of all tokens, inputs_NI."""
    seen = []
    hook = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2)))
    logits(model)
    hook.remove()
    return seen[0]


def loss(model: torch.nn.Module) -> float:
    return torch.nn.functional.cross_entropy(logits(model), torch.tensor([0, 1, 2])).item()


def test_magnitude_is_that_of_torch() -> None:
    model = make(BERT)
    found = look(model, "magnitude")[1]
    for part, importance in zip(parts_of(model), found, strict=True):
        torch_prune.ln_structured(part.down, "weight", amount=12, n=2, dim=1)
        gone = (part.down.weight_mask.sum(0) == 0).nonzero().flatten()
        assert set(gone.tolist()) == set(importance.argsort()[:12].tolist())


def test_wanda_adds_its_scores_of_single_weights_up() -> None:
    model = make(BERT)
    for part, importance in zip(parts_of(model), look(model, "wanda")[1], strict=True):
        scores = part.down.weight.detach().abs() * inputs_of(model, part.down).norm(p=2, dim=0)
        expected = scores.sum(dim=0)
        torch.testing.assert_close(importance / importance.sum(), expected / expected.sum())


@pytest.mark.parametrize("config", [BERT, CONFIGS[-1]], ids=lambda config: config.model_type)
def test_taylor_is_how_the_loss_changes(config: PreTrainedConfig) -> None:
    """By central differences of the loss, with what a head or a neuron adds to the states scaled up and down."""
    model = make(config).double()
    heads, neurons = look(model, "taylor")
    part = parts_of(model)[1]
    step = 1e-4
    for module, found, width in ((part.out, heads[1], 16), (part.down, neurons[1], 1)):
        for block in (0, 1):
            places, whole, seen = slice(block * width, (block + 1) * width), weight_of(module).detach().clone(), []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    weight_of(module)[places] = whole[places] * factor
                seen.append(loss(model))
            with torch.no_grad():
                weight_of(module)[:] = whole
            torch.testing.assert_close(found[block].item(), abs(seen[0] - seen[1]) / (2 * step), rtol=1e-3, atol=1e-7)


@each_kind
@pytest.mark.parametrize("config", KNOWN, ids=lambda config: config.model_type)
def test_sliced_is_masked(config: PreTrainedConfig, kind: str) -> None:
    """A model without its least important neurons answers as the whole one does where these say nothing."""
    model = make(config)
    importance = look(model, kind)[1]
    width = len(importance[0])
    pruned = cut(model, None, width // 2, kind)
    with torch.no_grad():
        for part, found in zip(parts_of(model), importance, strict=True):
            weight_of(part.down)[found.argsort()[: width - width // 2]] = 0
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-6)


def test_a_model_that_has_learned_nothing_does_not_tell_what_it_misses() -> None:
    model = make(BERT)
    model.has_new_head = True
    with pytest.raises(StageFailed, match="has no head for the task"):
        look(model, "taylor")


def test_a_job_prunes_and_brings_back_what_was_lost(tmp_path: Path) -> None:
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {
            "kind": "prune",
            "num_layers": 2,
            "intermediate_size": 24,
            "hidden_size": 16,
            "importance": {"kind": "taylor"},
        },
        {"kind": "distill", **FAST},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, student={"kind": "teacher_layers", "keep": [0, 1, 2]})
    done = Bench(tmp_path).lay().succeed_all(spec)
    pruned = done[2].last["summary"]
    assert pruned["num_parameters"] < 0.6 * pruned["num_parameters_before"]
    assert pruned["flops"] < 0.6 * pruned["flops_before"]
    assert pruned["validation"]["loss"] > pruned["validation_before"]["loss"]
    assert done[3].last["summary"]["validation"]["accuracy"] > 0.9
    made = Classifier.from_pretrained(done[4].outputs / "safetensors")
    assert made.num_parameters() == pruned["num_parameters"]
    config = made.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 16, 24)
    rows = json.loads((done[5].outputs / "report" / "report.json").read_text())["models"]
    assert {row["name"]: row["num_parameters"] for row in rows}["student"] == pruned["num_parameters"]


def test_a_language_model_is_pruned(tmp_path: Path) -> None:
    stage = {"kind": "prune", "intermediate_size": 64, "importance": TAYLOR}
    spec = make_spec([stage], task={"kind": "causal_lm", "block_tokens": 32})
    summary = Bench(tmp_path).lay_language().succeed(spec, labels=[]).last["summary"]
    assert summary["num_parameters_before"] - summary["num_parameters"] == 2 * 64 * (2 * 32 + 1)
    parts = summary["parameters"]
    assert parts["attention"] == 2 * (4 * 32 * 32 + 4 * 32)
    assert parts["feed_forward"] == 2 * (2 * 64 * 32 + 64 + 32 + 4 * 32)
    assert sum(parts.values()) == summary["num_parameters"]


def test_what_cannot_be_pruned_is_said_at_submit() -> None:
    spec: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
    with pytest.raises(SpecInvalid, match="nothing is to go"):
        load_spec(spec | {"stages": [{"kind": "prune"}]})
    with pytest.raises(SpecInvalid, match="unknown kind 'taylr'"):
        load_spec(spec | {"stages": [{"kind": "prune", "num_layers": 1, "importance": {"kind": "taylr"}}]})
    assert Prune(num_layers=1).reads(load_spec(spec | {"stages": [{"kind": "distill"}]})) == {"teacher"}
