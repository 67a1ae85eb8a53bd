"""Weights that stay as they are for a while."""

from torch.nn import Embedding, Module
from transformers import PreTrainedModel

from core.errors import StageFailed
from core.training import Freezing
from worker.engine.loading import find_layers


class Frozen:
    """Embeddings and first layers of a model, which learn nothing before a step, or never."""

    def __init__(self, model: PreTrainedModel, settings: Freezing, steps_per_epoch: int) -> None:
        """Finds the parameters; the embedding's must be those that are trained.

        Raises:
            StageFailed: `spec_invalid` for more layers than there are.
        """
        stack, count = find_layers(model)
        if settings.layers > count:
            message = f"{settings.layers} layers cannot be frozen: the model has {count}."
            raise StageFailed("spec_invalid", message, suggestion="Choose at most as many.")
        frozen: list[Module] = [
            module
            for name, module in model.named_modules()
            if isinstance(module, Embedding) or "Embeddings" in type(module).__name__
        ]
        frozen += [model.get_submodule(f"{stack}.{layer}") for layer in range(settings.layers)]
        self._parameters = {id(x): x for module in frozen for x in module.parameters() if x.requires_grad}.values()
        self._until = None if settings.epochs is None else round(settings.epochs * steps_per_epoch)

    def apply(self, step: int) -> None:
        """Freezes or frees them, as it is their turn at this step."""
        learns = self._until is not None and step >= self._until
        for parameter in self._parameters:
            parameter.requires_grad_(learns)
