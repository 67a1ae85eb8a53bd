"""A model's answers to a whole split."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.data import Encoded

INFERENCE_BATCH = 64


def predict_logits(
    model: PreTrainedModel, data: Encoded, between: Callable[[], None], batch_size: int = INFERENCE_BATCH
) -> Tensor:
    """Returns the logits of every row, in the order of the split, in float32 on the processor.

    The model answers in evaluation and inference mode, on the device where it lies, in batches sorted by length, and
    outside of `autocast` in the precision of its weights: these are the logits that its user gets.

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
    logits_NC = torch.zeros(data.num_rows, model.config.num_labels)
    with torch.inference_mode():
        for batch in data.by_length(batch_size, model.device):
            logits_NC[batch.row_numbers] = model(**batch.inputs).logits[batch.is_row].float().cpu()
            between()
    model.train(was_training)
    return logits_NC
