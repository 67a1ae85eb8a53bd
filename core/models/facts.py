"""What can be read from a model's config.json, and from the headers of its weights, without loading it."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from core.models.safetensors_header import Tensor
from core.models.widths import Composition, Widths, find_composition, read_widths

NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
TABLE = "_embeddings.weight"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads")
POSITION_KEYS = ("max_position_embeddings", "n_positions")
COUNT_FROM_PADDING = ("roberta", "xlm-roberta")
POST_NORM = ("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta")  # norms come after the sum
MAX_LAYERS = 10_000  # far more than any model has; checks list them
WIDTH_KEYS = ("hidden_size", "n_embd", "dim", "d_model")
TEXT_HEAD, WORD_HEAD = "ForSequenceClassification", "ForTokenClassification"  # the ends of names of model classes


class Depths(NamedTuple):
    """How many layers student and teacher have.

    Attributes:
        is_most: Whether those of the student are the most it may have.
        widths: How wide both are, where that is known.
    """

    student: int
    teacher: int
    is_most: bool = False
    widths: tuple[Widths, Widths] | None = None


class ModelFacts(BaseModel):
    """Size and kind of a model."""

    model_config = ConfigDict(frozen=True)

    model_type: str
    architectures: list[str] = []
    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    vocab_size: int | None = None
    num_positions: int | None = Field(None, description="Tokens of its longest input, where it has a limit.")
    num_parameters: int | None = None
    embedding_rows: int | None = Field(None, description="Rows of its tables of words, positions and types together.")
    embedding_size: int | None = Field(
        None, description="Width of its tables of words, where only a map makes states of another width of them."
    )
    layer_parameters: list[int] | None = Field(None, description="How many of the parameters each layer has.")
    composition: Composition | None = Field(None, description="How its parameters follow from its widths, if known.")
    told_widths: Widths | None = Field(None, description="How wide it is by its config.json, if that is known.")
    labels: list[str] | None = None
    has_fixed_weights: bool = Field(False, description="Whether weights are to stay zero, or on grids of few values.")
    grid_bits: list[int] = Field([], description="Bits of the grids that `quantize` put its weights on, each once.")

    @property
    def widths(self) -> Widths | None:
        """How wide it is, by its tensors or else by its config.json, as far as it is known."""
        return self.composition.widths if self.composition else self.told_widths

    @property
    def is_first_unlike(self) -> bool:
        """Whether its first layer has other weights than the second, as a ModernBERT's, which lacks a norm."""
        layers = self.layer_parameters
        return layers[0] != layers[1] if layers and len(layers) > 1 else self.model_type == "modernbert"

    @property
    def reuses_layers(self) -> bool:
        """Whether it has one layer's weights in several places, as an ALBERT unless all of its layers are stored."""
        return self.model_type == "albert" and not self.layer_parameters


def head_of(class_name: str) -> str | None:
    """Returns what a class of classifiers gives labels to: TEXT_HEAD, WORD_HEAD, or None of any other class."""
    return next((end for end in (TEXT_HEAD, WORD_HEAD) if class_name.endswith(end)), None)


def read_facts(
    config: dict[str, Any],
    num_parameters: int | None = None,
    tensors: Iterable[Tensor] | None = None,
    *,
    grid_bits: Sequence[int] = (),
) -> ModelFacts:
    """Returns the facts in a parsed config.json, and in its weights where they are at hand.

    Raises:
        ValueError: `model_type` is missing, the number of layers is absurd, or the weights are codes.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ValueError('config.json has no \'model_type\'; add it, such as "model_type": "bert"')
    if "\\u0000" in json.dumps(config):
        raise ValueError("config.json holds a NUL character; remove it")
    if config.get("quantization_config"):
        raise ValueError(
            "config.json has a 'quantization_config', so the weights are codes of few bits, from which no stage can "
            "learn; name the model as it was before it was quantised, in float32, bfloat16 or float16"
        )
    labels = config.get("id2label")
    weights = list(tensors or ())
    num_layers, states, num_heads = (_first_int(config, keys) for keys in (LAYER_KEYS, WIDTH_KEYS, HEAD_KEYS))
    if num_layers is not None and not 0 <= num_layers <= MAX_LAYERS:
        raise ValueError(f"config.json says that the model has {num_layers} layers; write how many it has")
    return ModelFacts(
        model_type=model_type,
        architectures=config.get("architectures") or [],
        num_layers=num_layers,
        hidden_size=states,
        num_heads=num_heads,
        vocab_size=_first_int(config, ("vocab_size",)),
        num_positions=count_positions(config),
        num_parameters=sum(tensor.num_elements for tensor in weights) if weights else num_parameters,
        embedding_rows=sum(sum(tensor.shape[:1]) for tensor in weights if tensor.name.endswith(TABLE)) or None,
        embedding_size=_find_embedding_size(config, states),
        layer_parameters=_count_layers(weights, num_layers),
        composition=find_composition(config, weights, states, num_heads),
        told_widths=read_widths(config, states, num_heads),
        labels=[labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) and labels else None,
        has_fixed_weights=bool(grid_bits or config.get("keeps_zeros")),
        grid_bits=list(grid_bits),
    )


def _count_layers(weights: list[Tensor], num_layers: int | None) -> list[int] | None:
    """Returns the parameters of each layer, or None unless just one list of tensors is numbered as the layers are."""
    stacks: dict[str, dict[int, int]] = {}
    for tensor in weights:
        found = NUMBERED.match(tensor.name)
        if found:
            counts = stacks.setdefault(found[1], {})
            counts[int(found[2])] = counts.get(int(found[2]), 0) + tensor.num_elements
    fitting = [counts for counts in stacks.values() if len(counts) == num_layers == max(counts) + 1]
    return [fitting[0][number] for number in sorted(fitting[0])] if len(fitting) == 1 else None


def _find_embedding_size(config: dict[str, Any], states: int | None) -> int | None:
    found = _first_int(config, ("embedding_size",))
    return None if found == states or config["model_type"] == "albert" else found  # which has a map for any width


def count_positions(config: dict[str, Any]) -> int | None:
    """Returns how many tokens a text may have, None without a limit; RoBERTa counts from after the place of padding."""
    found = _first_int(config, POSITION_KEYS)
    if found is None or config["model_type"] not in COUNT_FROM_PADDING:
        return found
    return found - (_first_int(config, ("pad_token_id",)) or 0) - 1


def _first_int(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int), None)
