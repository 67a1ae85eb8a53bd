"""What matrices and layers hear of batches that are filled up: no more than of the same texts one by one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, OPTConfig, PreTrainedConfig

from core.registry import list_methods
from tests.unit.test_engine_models import CONFIGS, SIZES, make
from tests.unit.test_engine_narrowing import KNOWN, context, parts_of
from tests.unit.test_engine_relay import CONTEXT, make_any
from worker.engine.blocks import Blocks
from worker.engine.calibrating import Samples
from worker.engine.data import Batch, Encoded
from worker.engine.importance import hearing
from worker.engine.loading import find_layers
from worker.engine.matrices import change_layers, find_matrices
from worker.engine.narrowing import _look

CPU = torch.device("cpu")
TEXTS = [np.arange(4, 4 + length, dtype=np.int32) for length in (12, 7, 9, 3)]
FLATTENING = OPTConfig(  # whose neurons get all texts in one row
    **SIZES | {"ffn_dim": 48}, word_embed_proj_dim=32, pad_token_id=0, max_position_embeddings=32
)
DECODER = GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=2)
Heard = dict[str, tuple[torch.Tensor, ...]]


class OneByOne:
    """A split of which every batch has one text, and nothing else."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def shuffled(self, *_: object) -> Iterator[Batch]:
        for row in range(len(self.split)):
            batch = self.split.batch(np.array([row]), CPU)
            some_T = batch.is_token[0]
            inputs = {name: ids_BT[:, some_T] for name, ids_BT in batch.inputs.items()}
            yield Batch(inputs, batch.labels, batch.rows)


def texts_of(*names: str) -> Encoded:
    """Returns four texts of several lengths, which fit in one batch."""
    columns = {"input_ids": TEXTS, "attention_mask": [np.ones_like(ids) for ids in TEXTS]}
    pads = {"input_ids": 0, "attention_mask": 0}
    return Encoded({name: columns[name] for name in names}, pads, torch.tensor([0, 1, 2, 0]), 12, 0, "")


def listen(model: Any, data: Any) -> Heard:
    """Returns what each matrix hears of a split, in a model that stays as it is."""
    heard: Heard = {}

    def change(matrix: Any) -> torch.Tensor:
        heard[matrix.name] = matrix.gram_II, matrix.size_I, matrix.largest_I
        return matrix.weight_OI.clone()

    change_layers(CONTEXT, model, find_matrices(model), data, change)
    return heard


def assert_same(found: Heard, wanted: Heard) -> None:
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        for one, other in zip(found[name], right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.max().item(), msg=name)


@pytest.mark.parametrize("config", [*CONFIGS, FLATTENING], ids=lambda config: config.model_type)
def test_matrices_hear_of_a_padded_batch_what_they_hear_of_its_texts(config: PreTrainedConfig) -> None:
    model, split = make_any(config), texts_of("input_ids", "attention_mask")
    assert_same(listen(model, split), listen(model, OneByOne(split)))


def test_matrices_hear_nothing_of_what_fills_the_last_block_up() -> None:
    ids_S = np.arange(4, 44, dtype=np.int32)
    model, split = make_any(DECODER), Blocks(ids_S, np.ones(len(ids_S), dtype=bool), 16)
    assert split.num_places % split.max_length
    assert_same(listen(model, split), listen(model, OneByOne(split)))


@pytest.mark.parametrize("kind", ["activation", "wanda"])
@pytest.mark.parametrize("config", KNOWN, ids=lambda config: config.model_type)
def test_states_heads_and_neurons_count_by_their_tokens(config: PreTrainedConfig, kind: str) -> None:
    model, split, by = make(config), texts_of("input_ids", "attention_mask"), list_methods("pruning")[kind]()
    parts = {f"{find_layers(model)[0]}.{number}": part for number, part in enumerate(parts_of(model))}
    looks: list[Any] = [_look(context(), model, data, parts, by) for data in (split, OneByOne(split))]  # type: ignore[arg-type]
    padded, alone = ([look.states, *look.groups, *look.neurons] for look in looks)
    for found, wanted in zip(padded, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.max().item())


def test_what_has_no_vector_for_each_place_is_heard_whole() -> None:
    linear, lengths = torch.nn.Linear(3, 3), []
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    batch = Batch({"input_ids": mask_BT, "attention_mask": mask_BT}, torch.tensor([0, 1]), torch.arange(2))
    with hearing(linear, {linear: lambda _, x_NI: lengths.append(len(x_NI))}) as tell:  # type: ignore[arg-type,func-returns-value]
        tell(batch)
        for shape in ((2, 4), (8,), (5,), (1, 6), (2,)):  # by places, in one row, without padding, a table, pooled
            linear(torch.randn(*shape, 3))
    assert lengths == [5, 5, 5, 6, 2]


def test_fixed_scales_are_of_texts_without_padding() -> None:
    """Which gives a text of an odd length one token more."""
    samples = Samples(texts_of("input_ids", "attention_mask"), 4, 0)
    found = [inputs for inputs in iter(samples.get_next, None) if inputs]
    assert sorted(inputs["input_ids"].shape for inputs in found) == [(1, 3), (1, 7), (1, 9), (1, 12)]
    assert all(inputs["attention_mask"].all() for inputs in found)
