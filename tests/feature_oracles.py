"""What the losses on layers are, by the formulas of their papers, for what stock transformers says of a model."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from worker.engine.data import Batch

PROJECTIONS = {"bert": ("query", "key", "value"), "distilbert": ("q_lin", "k_lin", "v_lin"), "gpt2": ("c_attn",)}


def states(model: PreTrainedModel, batch: Batch) -> Any:
    """What stock transformers says of a model's layers, and of its attention, which it multiplies out step by step.

    Queries, keys and values are what the last layer projects, of models that do nothing else to them.
    """
    plain = AutoModelForSequenceClassification.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    plain.to(model.dtype).load_state_dict(model.state_dict())
    made: list[Tensor] = []
    for end in PROJECTIONS.get(model.config.model_type, ()):
        *_, last = (module for name, module in plain.named_modules() if name.endswith(f".{end}"))
        last.register_forward_hook(lambda _, __, output: made.append(output))
    found = plain.eval()(**batch.inputs, output_hidden_states=True, output_attentions=True)
    projected = zip(("query", "key", "value"), torch.cat(made, dim=-1).chunk(3, dim=-1) if made else (), strict=False)
    return SimpleNamespace(model=plain, **found, **dict(projected))


def rows(x: Tensor, batch: Batch) -> Tensor:
    return x[batch.inputs["attention_mask"].bool()]


Oracle = Callable[[Any, Any, Batch], Tensor]
Place = tuple[int, int, int, slice]


def each_query(distance: Callable[[Any, Any, Place], Tensor]) -> Oracle:
    """An oracle from the distance at a place: a text, one of the student's heads, a query and the keys that it sees."""

    def summed(s: Any, t: Any, batch: Batch) -> Tensor:
        heads, is_causal = s.model.config.num_attention_heads, s.model.config.model_type in ("gpt2", "llama")
        places = [
            (text, head, query, slice(query + 1 if is_causal else length))
            for text, length in enumerate(batch.inputs["attention_mask"].sum(dim=-1).tolist())
            for head in range(heads)
            for query in range(length)
        ]
        return torch.stack([distance(s, t, place) for place in places]).sum() / heads

    return summed


def scores(a_BTD: Tensor, b_BTD: Tensor, place: Place, heads: int) -> Tensor:
    """Returns the products of a query with the keys that it sees, over the root of their width."""
    text, head, query, seen = place
    a_Td, b_Td = (x_BTD[text].chunk(heads, dim=-1)[head] for x_BTD in (a_BTD, b_BTD))
    return b_Td[seen] @ a_Td[query] / a_Td.shape[-1] ** 0.5


def relation_of(part: str) -> Callable[[Any, Any, Place], Tensor]:
    """KL(R_t ‖ R_s) of the rows of one projection, in as many heads as the student's attention has."""

    def distance(s: Any, t: Any, place: Place) -> Tensor:
        heads = s.model.config.num_attention_heads
        x_BTD = (getattr(model, part) for model in (t, s))
        return kl_divergence(*(Categorical(logits=scores(x, x, place, heads)) for x in x_BTD))

    return distance


ORACLES: dict[str, Oracle] = {
    "hidden_mse": lambda s, t, batch: (
        F.mse_loss(*(rows(x.hidden_states[-1], batch) for x in (s, t))) * batch.inputs["attention_mask"].sum()
    ),
    "hidden_cosine": lambda s, t, batch: (
        1 - F.cosine_similarity(*(rows(x.hidden_states[-1], batch) for x in (s, t)))
    ).sum(),
    "patient": lambda s, t, batch: (
        (F.normalize(s.hidden_states[-1][:, 0], dim=-1) - F.normalize(t.hidden_states[-1][:, 0], dim=-1)).square().sum()
    ),
    "attention_kl": each_query(
        lambda s, t, place: kl_divergence(*(Categorical(probs=x.attentions[-1][place]) for x in (t, s)))
    ),
    "attention_mse": each_query(
        lambda s, t, place: F.mse_loss(
            *(scores(x.query, x.key, place, x.model.config.num_attention_heads) for x in (s, t))
        )
    ),
    "value_relation": each_query(relation_of("value")),
    "relations": each_query(
        lambda s, t, place: sum(relation_of(part)(s, t, place) for part in ("query", "key", "value"))
    ),
}
