"""How much the inputs of linear maps count, one by one or in blocks, over a sample of the data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.compressing import Importance
from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.objective import label_objective
from worker.kernels.heads import backward

BATCH = 32
PART_TOKENS = 1024  # of a batch at a time; a gradient keeps all that layers make of them
Map: TypeAlias = Linear | Conv1D
Note: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]  # of all that a map gets, and x_NI of tokens


def by_input(linear: Map) -> Tensor:
    """Returns a linear map's weight with a row for each of its inputs, weight_ID."""
    weight: Tensor = linear.weight.detach()
    return weight if isinstance(linear, Conv1D) else weight.T


class Site:
    """A linear map whose inputs may be left out, in blocks of one width, and what was seen of them.

    Attributes:
        weight_ID: Its weights, a row for each input.
        size_I: Mean size of each input, over all tokens.
        square_I: Mean square of each input.
        effect_I: Of each batch, the size of the derivative of its loss by a gate on the block; the mean, spread over
            the block's inputs.
    """

    def __init__(self, module: Map, block: int) -> None:
        self.weight_ID, self._block = by_input(module).float(), block
        zeros_I = torch.zeros(len(self.weight_ID), device=self.weight_ID.device)
        self.size_I, self.square_I, self.effect_I = zeros_I, zeros_I.clone(), zeros_I.clone()
        self._gate_B = torch.ones(len(zeros_I) // block, device=zeros_I.device, requires_grad=True)
        self._num_tokens, self._num_batches = 0, 0

    def note(self, x: Tensor, x_NI: Tensor) -> Tensor | None:
        """Adds the inputs of a forward pass up, and returns them behind a gate whose derivative can be asked for."""
        self.size_I += x_NI.abs().sum(0)
        self.square_I += x_NI.square().sum(0)
        self._num_tokens += len(x_NI)
        if not torch.is_grad_enabled():
            return None
        return x * self._gate_B.repeat_interleave(self._block).to(x.dtype)

    def end_batch(self) -> None:
        """Adds the derivative of a batch's loss by the gate up."""
        self._num_batches += 1
        if self._gate_B.grad is not None:
            self.effect_I += self._gate_B.grad.abs().repeat_interleave(self._block) / self._block
            self._gate_B.grad = None

    def blocks(self, importance_I: Tensor) -> Tensor:
        """Returns the importance of each block, on the processor."""
        return importance_I.unflatten(0, (-1, self._block)).sum(-1).cpu()

    def finish(self) -> None:
        """Makes means of the sums."""
        self.size_I /= max(1, self._num_tokens)
        self.square_I /= max(1, self._num_tokens)
        self.effect_I /= max(1, self._num_batches)


@contextmanager
def hearing(
    model: PreTrainedModel, notes: Mapping[Map, Note], said: Mapping[Module, Note] | None = None
) -> Iterator[Callable[[Batch], None]]:
    """Has notes hear what their maps get, or what the modules of `said` say, of tokens and not of padding.

    Yields what must be told of a batch before the model reads it. What a map gets in the place of its input is what its
    note returns, if that is not None.
    """
    is_token_BT = torch.empty(0)

    def tell(batch: Batch) -> None:
        nonlocal is_token_BT
        is_token_BT = batch.is_token

    def hear(note: Note, _: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        instead = note(inputs[0], _tokens_of(inputs[0], is_token_BT))
        return None if instead is None else (instead, *inputs[1:])

    def hear_said(note: Note, _: Module, __: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        note(x, _tokens_of(x, is_token_BT))

    model.eval()
    with ExitStack() as hooks:
        for module, note in notes.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(hear, note)))
        for layer, note in (said or {}).items():
            hooks.enter_context(layer.register_forward_hook(partial(hear_said, note)))
        yield tell


def _tokens_of(x: Tensor, is_token_BT: Tensor) -> Tensor:
    """Returns what a tensor has at tokens, in single precision, x_NI.

    That is all of one that has no vector for each place of the batch: a model may leave its padding out itself, or put
    a table through the same map, as that of distances.
    """
    x_NI, is_token_N = x.detach().float().flatten(0, -2), is_token_BT.flatten()
    return x_NI[is_token_N] if x.shape[:-1] in (is_token_BT.shape, is_token_N.shape) else x_NI


def watch(
    ctx: StageContext,
    model: PreTrainedModel,
    sites: dict[Map, Site],
    by: Importance,
    data: Any,
    said: Mapping[Module, Note] | None = None,
) -> None:
    """Runs the model over a sample of the data, and has the sites note what they get; and others, what modules say.

    Raises:
        StageFailed: `spec_invalid` if gradients are needed of a model that has learned nothing of the task.
    """
    if by.needs_gradients and model.has_new_head:
        message = f"The model has no head for the task, so '{by.kind}' cannot tell what it misses."
        raise StageFailed("spec_invalid", message, suggestion="Put a finetune stage before this one.")
    objective = label_objective(ctx)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the gates alone are asked for
    with hearing(model, {module: site.note for module, site in sites.items()}, said) as tell:
        for batch in data.shuffled(BATCH, [ctx.seed], 0, ctx.device):
            heard = partial(objective, resting=objective.resting(batch))
            for part in batch.parts(max(1, PART_TOKENS // batch.inputs["input_ids"].shape[1])):
                tell(part)
                with torch.set_grad_enabled(by.needs_gradients):
                    answer = ctx.task.answer(model, part)
                if by.needs_gradients:
                    backward(answer, heard, None, part.row_labels, int(batch.is_row.sum()))
                del answer  # and all that its gradient kept, before more of it is made
            for site in sites.values():
                site.end_batch()
            ctx.check_stop()
    for parameter in learning:
        parameter.requires_grad_(True)
    for site in sites.values():
        site.finish()


def rank_blocks(ctx: StageContext, sites: Iterable[Site], by: Importance) -> list[Tensor]:
    """Returns how much each block of each site counts."""
    importance = by.build(ctx)
    return [site.blocks(importance(site)) for site in sites]
