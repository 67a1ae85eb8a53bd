"""What can be read from a model's config.json without loading it."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "dim", "d_model")


class ModelFacts(BaseModel):
    """Size and kind of a model."""

    model_config = ConfigDict(frozen=True)

    model_type: str
    architectures: list[str] = []
    num_layers: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    num_parameters: int | None = None
    labels: list[str] | None = None


def read_facts(config: dict[str, Any], num_parameters: int | None = None) -> ModelFacts:
    """Returns the facts in a parsed config.json. Raises ValueError when `model_type` is missing."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ValueError('config.json has no \'model_type\'; add it, such as "model_type": "bert"')
    if "\\u0000" in json.dumps(config):
        raise ValueError("config.json holds a NUL character; remove it")
    labels = config.get("id2label")
    return ModelFacts(
        model_type=model_type,
        architectures=config.get("architectures") or [],
        num_layers=_first_int(config, LAYER_KEYS),
        hidden_size=_first_int(config, WIDTH_KEYS),
        vocab_size=_first_int(config, ("vocab_size",)),
        num_parameters=num_parameters,
        labels=[labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) and labels else None,
    )


def _first_int(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int), None)
