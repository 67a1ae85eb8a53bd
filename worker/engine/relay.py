"""A model run as far as one layer after the other, each of which runs no more often the more there are."""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.loading import find_layers, some_tokens

SAME = 1e-4  # of the largest value that a layer says; it is computed in the same way twice
log = logging.getLogger(__name__)


class Enough(Exception):
    """Raised where the model is not to be run any further."""


class Relay:
    """Runs a model as far as each of its layers in turn, always on the same batches in the same order.

    The model's own code calls the layers, so that each gets the masks and all else that are its own. But at a layer's
    turn only the one before it is run, which may have been changed since its own turn, and the layer itself: what the
    one before these said is kept from the turn before. So each runs twice on a batch. What is kept lies where the model
    does, and takes four bytes for each token of all batches and each value of a state, as 12 MB for 8,000 tokens of a
    width of 384.

    Whether a model's layers hear of earlier ones nothing but what the one before them says is found by trial. Where
    they do, as where several share keys and values, the whole model is run at every turn.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._layers = model.eval(), [*model.get_submodule(find_layers(model)[0]).children()]
        self._options = {"use_cache": False} if model.can_generate() else {}
        self._said: deque[Any] = deque()  # of each batch, at the end of a turn, by the layer before
        self._is_chain = True
        if not self._is_alike():
            log.info("the layers hear more than the one before them says; the whole model is run for each")
            self._is_chain = False
        self._said.clear()

    def run(self, turn: int, inputs: dict[str, Tensor]) -> None:
        """Has the model read a batch as far as the layer of this number, from 0 on; every turn has all batches."""
        if not self._is_chain:
            return self._read(inputs)
        for number, layer in enumerate(self._layers):
            vars(layer)["forward"] = partial(self._call, number - turn, layer.forward)
        try:
            with suppress(Enough):
                self._read(inputs)
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    def _read(self, inputs: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self._model.base_model(**inputs, **self._options)

    def _call(self, ahead: int, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Returns what a layer says that is so many layers ahead of the one whose turn it is."""
        if ahead > 0:
            raise Enough
        if ahead < -1:
            return self._said.popleft() if ahead == -2 else self._said[0]
        output = forward(*given, **named)
        if ahead == -1:
            self._said.append(output)
        return output

    def _is_alike(self) -> bool:
        """Returns whether, on a few tokens, each layer says in its turn what it says when the whole model is run."""
        said: list[Tensor] = []

        def note(_: Any, __: Any, output: Any) -> None:
            said.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(note) for layer in self._layers]
        inputs = {"input_ids": some_tokens(self._model)}
        try:
            self._read(inputs)
            whole = tuple(said)
            for turn, wanted in enumerate(whole):
                self.run(turn, inputs)
                if (said[-1] - wanted).abs().max() > SAME * wanted.abs().max():
                    return False
        except Exception as error:  # whatever a layer raises that misses what another one leaves
            log.info("%s: %s", type(error).__name__, error)
            return False
        finally:
            for hook in hooks:
                hook.remove()
        return True
