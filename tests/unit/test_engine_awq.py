"""Scales that move into what makes the inputs of matrices, and what AWQ gains by them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.llama_cpp import STORIES, needs_stories
from tests.unit.test_engine_models import CONFIGS, LLAMA, SIZES, make
from worker.engine.data import Batch
from worker.engine.folding import move_scales
from worker.engine.importance import hearing
from worker.engine.matrices import Matrix, find_matrices
from worker.engine.quantizing import Wanted
from worker.methods.quantization.awq import Awq

BERT, GPT2, MODERN = CONFIGS[0], CONFIGS[-1], CONFIGS[4]
GROUPED = LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)
IDS = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))
ENDS = {  # of the names of the matrices whose inputs can be scaled
    "bert": {"attention.output.dense"},
    "gpt2": {"c_attn", "attn.c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "modernbert": {"Wqkv", "Wi", "attn.Wo", "mlp.Wo"},
}


def make_loud(config: Any) -> torch.nn.Module:
    """Returns a model some of whose norms and values are much louder than others."""
    model = make(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower() + "ln_" * ("ln_" in name):
                parameter.add_(torch.randn(parameter.shape, generator=draw))
            elif parameter.ndim == 2:
                parameter.mul_(4 * torch.rand((*parameter.shape[:1], 1), generator=draw))
    return model


def show(model: torch.nn.Module, found: list[Matrix], ids_BT: Tensor = IDS) -> None:
    """Has matrices note what they hear."""
    with torch.no_grad(), hearing(model, {matrix.module: matrix.note for matrix in found}) as tell:
        tell(Batch({"input_ids": ids_BT}, torch.empty(0), torch.empty(0)))
        model(input_ids=ids_BT)


def draw_scale(hearing: list[Matrix]) -> Tensor:
    size = len(hearing[0].size_I)
    return torch.rand(size, generator=torch.Generator().manual_seed(size)) * 3 + 0.3


@pytest.mark.parametrize("config", [BERT, GPT2, LLAMA, MODERN], ids=lambda config: config.model_type)
def test_a_model_with_moved_scales_says_the_same(config: Any) -> None:
    model = make_loud(config)
    before, wanted = copy.deepcopy(model), model(input_ids=IDS).logits
    for layer in find_matrices(model):
        show(model, layer)
        heard = {matrix.name: matrix.gram_II.clone() for matrix in layer}
        move_scales(model, layer, draw_scale)
        again = [Matrix(matrix.name.removesuffix(".weight"), matrix.module) for matrix in layer]
        show(model, again)
        for matrix, fresh in zip(layer, again, strict=True):
            torch.testing.assert_close(matrix.gram_II, fresh.gram_II, rtol=1e-3, atol=1e-4 * fresh.gram_II.max())
            torch.testing.assert_close(matrix.size_I, fresh.size_I, rtol=1e-3, atol=1e-4)
            is_scaled = not torch.allclose(matrix.gram_II, heard[matrix.name], rtol=1e-2)
            is_first = config is MODERN and "layers.0." in matrix.name  # which has no norm before its attention
            ends = ENDS[config.model_type] - ({"Wqkv"} if is_first else set())
            assert is_scaled == matrix.name.removesuffix(".weight").endswith(tuple(ends)), matrix.name
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    old, new = before.state_dict(), model.state_dict()
    kept = [name for name in old if torch.equal(old[name], new[name])]
    assert any("embed" in name or "wte" in name for name in kept)
    if config is BERT:
        assert all("value" in name or "attention.output.dense.weight" in name for name in set(old) - set(kept))


def test_values_that_several_heads_share_are_left_alone() -> None:
    model = make_loud(GROUPED)
    [layer, *_] = find_matrices(model)
    show(model, layer)
    before = copy.deepcopy(model).state_dict()
    move_scales(model, layer, draw_scale)
    assert torch.equal(before["model.layers.0.self_attn.o_proj.weight"], layer[3].weight_OI)
    assert not torch.equal(before["model.layers.0.self_attn.v_proj.weight"], layer[2].weight_OI)


@pytest.mark.parametrize("config", [BERT, GPT2, LLAMA], ids=lambda config: config.model_type)
@pytest.mark.parametrize("wanted", [Wanted(3, 16, symmetric=False), Wanted(4, None, symmetric=True)], ids=str)
def test_outputs_lose_less_than_by_rounding_to_the_nearest(config: Any, wanted: Wanted) -> None:
    """Of each matrix, with what it hears in the model as it was; what AWQ scales is scaled back."""
    model, method = make_loud(config), Awq()
    round_weights, scale = method.build(None), method.build_scaling(None)
    sums = {"awq": 0.0, "rtn": 0.0}
    for layer in find_matrices(model):
        show(model, layer)
        old = {matrix.name: (matrix.weight_OI.double(), matrix.gram_II.double()) for matrix in layer}
        move_scales(model, layer, lambda hearing: scale(hearing, [wanted.round] * len(hearing)))
        for matrix in layer:
            weight_OI, gram_II = old[matrix.name]
            inputs_I = (gram_II.diagonal() / matrix.gram_II.double().diagonal()).sqrt()
            outputs_O1 = (matrix.weight_OI.double() / (weight_OI * inputs_I)).nanmedian(1, keepdim=True).values
            rounded_OI, _ = round_weights(matrix, wanted.fit, wanted.group)
            lost = {
                "awq": rounded_OI.double() / inputs_I / outputs_O1 - weight_OI,
                "rtn": wanted.round(weight_OI.float()).double() - weight_OI,
            }
            errors = {name: ((off_OI @ gram_II) * off_OI).sum().item() for name, off_OI in lost.items()}
            assert errors["awq"] <= errors["rtn"], matrix.name
            sums = {name: total + errors[name] for name, total in sums.items()}
    assert sums["awq"] < 0.9 * sums["rtn"]


@needs_stories
def test_a_real_model_forgets_less_than_by_rounding_to_the_nearest() -> None:
    """By the texts that it writes itself, some of which AWQ sees."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)
    torch.manual_seed(0)
    start = tokenizer(["Once upon a time"] * 16, return_tensors="pt")["input_ids"]
    ids_BT = model.generate(start, do_sample=True, max_new_tokens=64, pad_token_id=0)
    kept, wanted, method = copy.deepcopy(model), Wanted(3, None, symmetric=False), Awq()
    round_weights, scale = method.build(None), method.build_scaling(None)
    for layer in find_matrices(model):
        show(model, layer, ids_BT[:8])
        move_scales(model, layer, lambda hearing: scale(hearing, [wanted.round] * len(hearing)))
        for matrix in layer:
            matrix.weight_OI.copy_(round_weights(matrix, wanted.fit, None)[0])
    nearest = copy.deepcopy(kept)
    for layer in find_matrices(nearest):
        for matrix in layer:
            matrix.weight_OI.copy_(wanted.round(matrix.weight_OI))
    with torch.no_grad():
        losses = [one(input_ids=ids_BT[8:], labels=ids_BT[8:]).loss.item() for one in (kept, model, nearest)]
    assert losses[1] - losses[0] < 0.7 * (losses[2] - losses[0])
