"""A model's answers to a whole split."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from worker.engine import ranks
from worker.engine.data import Batch, Encoded
from worker.engine.loading import last_layers
from worker.engine.sharding import is_sharded
from worker.kernels.divergences import widen

INFERENCE_BATCH = 64
Answer = Callable[[dict[str, Tensor]], Tensor]  # a model, as a function from a batch's inputs to logits


@contextmanager
def ending_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Has a forward pass of the model leave `autocast` where it comes to its last layer.

    Logits in bf16 turn a tenth or more of a divergence's gradient into noise, once a student is close to its teacher,
    and numbers near 2,000 into multiples of 8 or 16.
    """
    kind = model.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    hooks = [layer.register_forward_pre_hook(_leave_autocast) for layer in last_layers(model)]
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, True)
        for hook in hooks:
            hook.remove()


def _leave_autocast(_: Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.set_autocast_enabled(given[0].device.type, False)
    return tuple(map(widen, given))


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Returns a classifier's logits, which its last layer makes in float32 within `autocast`, too."""
    with ending_in_float32(model):
        logits: Tensor = model(**inputs).logits
        return logits


def predict_logits(
    model: PreTrainedModel, data: Encoded, between: Callable[[], None], batch_size: int = INFERENCE_BATCH
) -> Tensor:
    """Returns the logits of every row, in the order of the split, in float32 on the processor.

    The model answers in evaluation mode, on the device where it lies, in batches sorted by length, and
    outside of `autocast` in the precision of its weights: these are the logits that its user gets. Processes that train
    together answer a share each.

    Args:
        model: The classifier; its training flag is left as it was.
        data: The tokenised split.
        between: Called after each batch; may raise to stop.
        batch_size: Texts in one batch.

    Returns:
        logits_NC.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():  # not inference mode, whose tensors a layer that is split could not train with
        batches: Iterable[Batch] = data.by_length(batch_size, model.device)
        is_shared = len(data) > batch_size * ranks.count()
        mine = ranks.share(batches, in_step=is_sharded(model)) if is_shared else batches
        logits_NC = answer_rows(data, mine, lambda inputs: logits_of(model, inputs), between)
        if is_shared:
            logits_NC = ranks.add_up(logits_NC.to(model.device)).cpu()
    model.train(was_training)
    return logits_NC


def answer_rows(
    data: Encoded,
    batches: Iterable[Batch],
    answer: Answer,
    between: Callable[[], None],
) -> Tensor:
    """Returns the logits of every row, logits_NC in the order of the split; zeros of one that no batch has.

    Args:
        data: The tokenised split.
        batches: All of it.
        answer: The model.
        between: Called after each batch; may raise to stop.
    """
    logits_NC: Tensor | None = None
    for batch in batches:
        found = batch.row_logits(answer(batch.inputs)).float().cpu()
        if logits_NC is None:
            logits_NC = torch.zeros(data.num_rows, found.shape[-1])
        logits_NC[batch.row_numbers] = found
        between()
    assert logits_NC is not None  # noqa: S101 - a split has rows
    return logits_NC


def as_answer(model: PreTrainedModel) -> Answer:
    """Returns a model, put into evaluation mode, as a function from inputs to logits."""
    model.eval()
    options = {"use_cache": False} if model.can_generate() else {}

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**inputs, **options).logits
            return logits

    return answer
