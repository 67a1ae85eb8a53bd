"""Adapters: a few weights that are trained beside those of a model, and kept apart from it or made part of it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel, get_peft_model
from torch.nn import Linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from worker.engine.loading import find_layers, is_head
from worker.engine.sharding import is_sharded

if TYPE_CHECKING:
    from core.compressing import Adapter
    from worker.engine.context import StageContext

log = logging.getLogger(__name__)


class Adapted:
    """A model with an adapter, which is trained with the head while all else is frozen.

    The model itself is changed in place, so that whoever holds it trains the adapter.
    """

    def __init__(self, ctx: "StageContext", model: PreTrainedModel, adapter: "Adapter") -> None:
        if is_sharded(model):
            message = "A model whose layers are split among processes gets no adapter."
            raise StageFailed("spec_invalid", message, suggestion="Leave the adapter out, or run it without that.")
        names, head = find_matrices(model, adapter), find_head(model)
        self._wrapped: PeftModel = get_peft_model(model, adapter.build(ctx)(names, head))
        trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
        log.info("%d weights are trained, %d matrices have an adapter", trained, len(names))
        self.num_trained = trained

    def save(self, folder: Path) -> None:
        """Writes the adapter and the head as `peft` reads them."""
        self._wrapped.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # an empty form of the library

    def merge(self) -> None:
        """Makes the adapter part of the model's own weights."""
        self._wrapped.merge_and_unload(safe_merge=True)


def find_matrices(model: PreTrainedModel, adapter: "Adapter") -> list[str]:
    """Returns the names of the matrices that get an adapter.

    Raises:
        StageFailed: `spec_invalid` for a layer that is not there.
    """
    stack, count = find_layers(model)
    layers = range(count) if adapter.layers is None else adapter.layers
    missing = [layer for layer in layers if not 0 <= layer < count]
    if missing:
        message = f"Layer {missing[0]} gets no adapter: the model has {count} layers, counted from 0."
        raise StageFailed("spec_invalid", message, suggestion="Choose from those that there are.")
    return [
        f"{stack}.{layer}.{name}"
        for layer in layers
        for name, module in model.get_submodule(f"{stack}.{layer}").named_modules()
        if isinstance(module, Linear | Conv1D)
        and adapter.parts in {"all", _part_of(model, f"{stack}.{layer}.{name}", below=f"{stack}.{layer}")}
    ]


def _part_of(model: PreTrainedModel, name: str, below: str) -> str:
    """Returns whether a matrix of a layer is of its attention or of its feed-forward part."""
    while (name := name.rpartition(".")[0]) != below:
        if "Attention" in type(model.get_submodule(name)).__name__:
            return "attention"
    return "feed_forward"


def find_head(model: PreTrainedModel) -> list[str]:
    """Returns the names of what is trained as a whole: what has weights outside of the encoder, and in its pooler."""
    last = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if is_head(model, f"{name}.") and module is not last and any(True for _ in module.parameters(recurse=False))
    ]
