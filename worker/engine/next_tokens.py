"""What a language model says of the token that comes next."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.inference import ending_in_float32
from worker.engine.loading import some_tokens
from worker.kernels.heads import Head


def predict_next(
    model: PreTrainedModel, inputs: dict[str, Tensor], is_row_BT: Tensor, num_tokens: int | None = None
) -> Head | Tensor:
    """Returns the logits of the tokens that follow some places, or what makes them; only of the first `num_tokens`."""
    if not hasattr(model, "has_plain_head"):
        model.has_plain_head = has_plain_head(model)
    if not model.has_plain_head:
        with ending_in_float32(model):
            logits_NC: Tensor = model(**inputs, use_cache=False).logits[is_row_BT]
        return logits_NC[:, :num_tokens]
    hidden_BTD = model.base_model(**inputs, use_cache=False).last_hidden_state
    layer = model.get_output_embeddings()
    bias = None if layer.bias is None else layer.bias[:num_tokens]
    return Head(hidden_BTD[is_row_BT], layer.weight[:num_tokens], bias)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Returns whether the logits are the last layer's product with the last hidden states and nothing else.

    Some models scale or cap their logits, or round them to half precision; theirs are then asked for, all of them at
    once.
    """
    layer, was_training = model.get_output_embeddings(), model.training
    if not isinstance(layer, torch.nn.Linear) or layer.weight.dtype != torch.float32:
        return False
    ids_BT = some_tokens(model)
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        fits = hidden_BTD.shape[-1] == layer.in_features
        is_plain = fits and torch.allclose(layer(hidden_BTD), logits_BTV, rtol=1e-4, atol=1e-4)
    model.train(was_training)
    return is_plain
