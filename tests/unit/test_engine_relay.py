"""What each layer hears while those before it are changed, beside a model that is run whole again and again."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    DebertaConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.unit.test_engine_models import CONFIGS, SIZES, make
from worker.engine.data import Batch
from worker.engine.importance import hearing
from worker.engine.matrices import Matrix, change_layers, find_matrices
from worker.engine.relay import Relay

RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
ENCODERS: list[PreTrainedConfig] = [
    *CONFIGS,
    DebertaConfig(**SIZES, **RELATIVE),
    DebertaV2Config(**SIZES, **RELATIVE, conv_kernel_size=3),
    AlbertConfig(**SIZES, embedding_size=16, num_hidden_groups=4),
]
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
DECODERS: list[PreTrainedConfig] = [
    GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=2),
    LlamaConfig(**GROUPED),
    Qwen2Config(**GROUPED, **SLIDING),
    Qwen3Config(**GROUPED, **SLIDING),
    Gemma2Config(**GROUPED, sliding_window=4),
    GPTNeoXConfig(**SIZES),
]
SHARING = Gemma3nTextConfig(
    **GROUPED,
    sliding_window=4,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=60,
    hidden_size_per_layer_input=8,
    laurel_rank=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * 4,
    altup_num_inputs=2,
)
LENGTHS = (12, 7, 9)
each = pytest.mark.parametrize("config", [*ENCODERS, *DECODERS, SHARING], ids=lambda config: config.model_type)


class Texts:
    """Three batches of two texts, the second one shorter than the first, each batch of a length of its own."""

    def shuffled(self, *_: object) -> Iterator[Batch]:
        for length in LENGTHS:
            ids_BT = torch.arange(4, 4 + 2 * length).reshape(2, length)
            mask_BT = torch.ones_like(ids_BT)
            mask_BT[1, length - 3 :] = 0
            yield Batch({"input_ids": ids_BT, "attention_mask": mask_BT}, torch.tensor([0, 1]), torch.arange(2))


CONTEXT: Any = SimpleNamespace(
    seed=0, device=torch.device("cpu"), check_stop=lambda: None, progress=lambda *_: None
)  # all that is asked of a stage


def make_any(config: PreTrainedConfig) -> Any:
    """Returns a classifier, or a language model where there is one of this kind, whose layers say much."""
    if config in ENCODERS:
        model: Any = make(config)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def change(matrix: Matrix) -> Tensor:
    """Returns weights that hang on what was heard."""
    loudness_I = matrix.gram_II.diagonal().sqrt()
    return (matrix.weight_OI * (1 + loudness_I / loudness_I.max().clamp(min=1e-6))).round(decimals=1)


def change_by_the_book(model: Any, layers: list[list[Matrix]], change: Callable[[Matrix], Tensor]) -> None:
    """The same with the whole model run for each layer."""
    for layer in layers:
        with torch.no_grad(), hearing(model, {matrix.module: matrix.note for matrix in layer}) as tell:
            for batch in Texts().shuffled():
                tell(batch)
                model(**batch.inputs)
        for matrix in layer:
            matrix.weight_OI.copy_(change(matrix))


@each
def test_layers_hear_what_they_would_if_the_whole_model_ran(config: PreTrainedConfig) -> None:
    model, heard = make_any(config), {}
    other = copy.deepcopy(model)

    def note(into: dict[str, Any]) -> Callable[[Matrix], Tensor]:
        def noting(matrix: Matrix) -> Tensor:
            into[matrix.name] = matrix.gram_II.clone(), matrix.size_I.clone(), matrix.largest_I.clone()
            return change(matrix)

        return noting

    change_layers(CONTEXT, model, find_matrices(model), Texts(), note(heard))
    expected: dict[str, Any] = {}
    change_by_the_book(other, find_matrices(other), note(expected))
    assert heard.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted[0].any() or (config is SHARING and name.endswith(("k_proj.weight", "v_proj.weight")))
        for found, right in zip(heard[name], wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6 * right.max().item(), msg=name)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("config", [*ENCODERS, *DECODERS], ids=lambda config: config.model_type)
def test_each_layer_runs_twice_on_a_batch_and_the_last_one_once(config: PreTrainedConfig) -> None:
    model, calls = make_any(config), Counter[int]()
    layers = find_matrices(model)

    def count(number: int, inputs: tuple[Tensor, ...]) -> None:
        calls[number] += inputs[0].shape[:-1].numel() in {2 * length for length in LENGTHS}  # not in the trial

    for number, [first, *_] in enumerate(layers):
        first.module.register_forward_pre_hook(lambda _, inputs, number=number: count(number, inputs))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the whole model was run"))
    change_layers(CONTEXT, model, layers, Texts(), change)
    assert calls == {0: 2 * len(LENGTHS), 1: 2 * len(LENGTHS), 2: 2 * len(LENGTHS), 3: len(LENGTHS)}


def test_layers_that_use_what_earlier_ones_left_are_run_with_these() -> None:
    """As keys and values that are made by an earlier layer."""
    model, calls = make_any(SHARING), Counter[int]()
    relay, layers = Relay(model), find_matrices(model)
    for number, [first, *_] in enumerate(layers):
        first.module.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    for turn in range(4):
        for batch in Texts().shuffled():
            relay.run(turn, batch.inputs)
    assert calls == dict.fromkeys(range(4), 4 * len(LENGTHS))
