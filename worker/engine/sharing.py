"""Encoders whose layers share their weights."""

import re
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AlbertConfig, PreTrainedModel
from transformers.models.albert import modeling_albert

from core.errors import StageFailed
from worker.engine.loading import find_layers
from worker.kernels.factors import Norm, factorise

# What an ALBERT calls the parts of a layer of a BERT, and what lies around the layers.
IN_LAYER = {
    "attention.self": "attention",
    "attention.output": "attention",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}
AROUND = {"pooler.dense": "pooler", "classifier.dense": "albert.pooler", "classifier.out_proj": "classifier"}
EMBEDDINGS, FIRST_MAP = "albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"
TABLES = [f"{EMBEDDINGS}.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
SETTINGS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "type_vocab_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "label2id",
    "problem_type",
]


class Narrow(NamedTuple):
    """The width of embeddings, and how often each token occurs, by which they start."""

    size: int
    counts_V: NDArray[np.int64]


def share_layers(teacher: PreTrainedModel, num_groups: int, rule: str, narrow: Narrow | None = None) -> PreTrainedModel:
    """Returns an ALBERT as deep as the teacher, a BERT or RoBERTa, with one layer for each group of neighbours.

    With as many groups as layers it computes what the teacher does, if its embeddings are as wide as the states: the
    map after them is the identity. Narrower ones start near what the teacher's embeddings give.

    Raises:
        StageFailed: `spec_invalid` if the teacher is built otherwise.
    """
    stack, num_layers = find_layers(teacher)
    layers = [layer.state_dict() for layer in teacher.get_submodule(stack).children()]
    around = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(f"{stack}.")}
    state = {_rename(name.replace(f"{teacher.base_model_prefix}.", "albert."), AROUND): x for name, x in around.items()}
    padding = teacher.base_model.embeddings.position_embeddings.padding_idx
    state[TABLES[1]] = state[TABLES[1]][0 if padding is None else padding + 1 :]  # a RoBERTa counts from behind it
    size = num_layers // num_groups
    for group in range(num_groups):
        for name, tensor in _merge(layers[group * size : (group + 1) * size], rule).items():
            state[f"albert.encoder.albert_layer_groups.{group}.albert_layers.0.{_rename(name, IN_LAYER)}"] = tensor
    width = teacher.config.hidden_size
    state |= {f"{FIRST_MAP}.weight": torch.eye(width), f"{FIRST_MAP}.bias": torch.zeros(width)}
    if narrow and narrow.size < width:
        state |= _factorise(state, narrow, teacher.config.layer_norm_eps)
    return _fill(teacher, num_groups, state)


def _factorise(state: dict[str, Tensor], narrow: Narrow, eps: float) -> dict[str, Tensor]:
    """Returns embeddings of that width, and the map after them."""
    names, tables = [f"{EMBEDDINGS}.LayerNorm.{part}" for part in ("weight", "bias")], [state[name] for name in TABLES]
    counts_V = torch.from_numpy(narrow.counts_V[: len(tables[0])])
    made = factorise(tables, Norm(state[names[0]], state[names[1]], eps), narrow.size, counts_V)
    norms = dict(zip(names, (torch.ones(narrow.size), torch.zeros(narrow.size)), strict=True))
    maps = {f"{FIRST_MAP}.weight": made.map_HE, f"{FIRST_MAP}.bias": made.bias_H}
    return dict(zip(TABLES, made.tables, strict=True)) | norms | maps


def _merge(layers: list[dict[str, Tensor]], rule: str) -> dict[str, Tensor]:
    """Returns the weights from which a group's common layer starts."""
    if rule == "average":
        return {name: torch.stack([layer[name] for layer in layers]).mean(0) for name in layers[0]}
    return layers[{"first": 0, "middle": (len(layers) - 1) // 2, "last": -1}[rule]]


def _rename(name: str, table: dict[str, str]) -> str:
    """Returns a tensor's name with the first part of the table that it holds put in other words."""
    found = next((old for old in table if old in name), None)
    return name if found is None else name.replace(found, table[found])


def _fill(teacher: PreTrainedModel, num_groups: int, state: dict[str, Tensor]) -> PreTrainedModel:
    old, name = teacher.config, re.sub(r"^.*?(?=For|Model)", "Albert", type(teacher).__name__)
    config = AlbertConfig(
        **{setting: getattr(old, setting) for setting in SETTINGS},
        embedding_size=state[TABLES[0]].shape[-1],
        num_hidden_groups=num_groups,
        max_position_embeddings=len(state[TABLES[1]]),
        classifier_dropout_prob=old.hidden_dropout_prob if old.classifier_dropout is None else old.classifier_dropout,
    )
    try:
        student: PreTrainedModel = getattr(modeling_albert, name)._from_config(config, dtype=torch.float32)
        student.load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        message = f"The layers of a '{old.model_type}' like this one have no stock form that shares them."
        raise StageFailed("spec_invalid", message, suggestion="Choose another kind of student.") from error
    student.has_new_head = teacher.has_new_head
    return student
