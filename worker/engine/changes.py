"""What a stage that makes a model smaller changed."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.context import StageContext

WHOLE = 2**31 - 1  # no text is cut, but where the model has no more positions


class Reader(NamedTuple):
    """A model with the tokenizer that it reads by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def compare(ctx: StageContext, before: Reader, after: Reader) -> dict[str, Any]:
    """Returns parameters and validation scores of a model before the stage and after it."""
    return {
        "num_parameters": after.model.num_parameters(),
        "num_parameters_before": before.model.num_parameters(),
        "validation": score(ctx, after),
        "validation_before": score(ctx, before),
    }


def score(ctx: StageContext, reader: Reader) -> dict[str, float] | None:
    """Returns how well a model does on the validation split; None without one."""
    path = ctx.find_split("validation")
    if path is None:
        return None
    model, tokenizer = reader
    model.to(ctx.device)
    found: dict[str, float] = ctx.task.score(model, ctx.task.encode(path, model, tokenizer, WHOLE), ctx.check_stop)
    model.cpu()
    return found
