"""Students, and how they are made from their teacher."""

import copy
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from core.models.widths import Widths
from worker.engine.context import StageContext
from worker.engine.loading import find_layers

if TYPE_CHECKING:
    from worker.methods.students.fresh import Fresh

INNER_WIDTHS = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "ffn_hidden_size", "dff", "d_inner")
log = logging.getLogger(__name__)


def load_student(ctx: StageContext) -> PreTrainedModel:
    """Returns the student that an earlier stage made, or else the one that the spec describes."""
    student: PreTrainedModel = ctx.load_model("student") if ctx.has_input("student") else ctx.spec.student.build(ctx)
    return student


def load_student_tokenizer(ctx: StageContext) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of what the student was made from."""
    return ctx.load_tokenizer(next(role for role in ("student", "base", "teacher") if ctx.has_input(role)))


def take_sample(ctx: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns examples as a model reads them, of the validation split, or of the training split where there is none."""
    return ctx.task.sample(ctx.find_split("validation") or ctx.get_split("train"), model, tokenizer)


def load_either(ctx: StageContext, role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the teacher or the student, as it is so far, with its tokenizer."""
    if role == "teacher":
        return ctx.load_model("teacher"), ctx.load_tokenizer("teacher")
    return load_student(ctx), load_student_tokenizer(ctx)


def choose_layers(
    ctx: StageContext, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, rule: str
) -> list[int]:
    """Returns the layers that a rule keeps.

    Raises:
        StageFailed: By importance, of a teacher that has learned nothing of the task.
    """
    num_layers = find_layers(teacher)[1]
    if rule == "importance":
        return next(kept for kept in drop_layers(ctx, teacher, tokenizer) if len(kept) <= count)
    first = list(range(count))
    uniform = [(index + 1) * num_layers // count - 1 for index in first]
    if _is_first_unlike(teacher):
        uniform[0] = 0
    return {"first": first, "last": [num_layers - count + index for index in first], "uniform": uniform}[rule]


def drop_layers(ctx: StageContext, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yields all layers, and then again and again what is left of them without the one whose loss hurts least.

    Raises:
        StageFailed: The teacher has learned nothing of the task.
    """
    if teacher.has_new_head:
        message = "The model has no head for the task, so nothing tells which of its layers are important."
        hint = "Put a finetune stage before this one, name a model that was fine-tuned, or choose by another rule."
        raise StageFailed("spec_invalid", message, suggestion=hint)
    data, kept = take_sample(ctx, teacher, tokenizer), [*range(find_layers(teacher)[1])]
    stays = _is_first_unlike(teacher)
    yield kept
    while len(kept) > 1:
        scored = []
        for layer in kept[1:] if stays else kept:
            rest = [other for other in kept if other != layer]
            model = keep_layers(teacher, rest).to(ctx.device)
            scored.append((ctx.task.rank(ctx.task.score(model, data, ctx.check_stop))[-1], rest))
        kept = max(scored)[1]
        log.info("layers %s are left, with a score of %.4f", kept, max(scored)[0])
        yield kept


def keep_layers(teacher: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """Returns a model of the teacher's class with these layers of it, renumbered from 0, and all its other weights.

    The student is built from a changed config and filled by name, so that stock `transformers` builds it again.

    Raises:
        StageFailed: The model keeps its layers in no single list as long as its config says, or another would take
            the place of a first layer that is unlike it.
    """
    stack, _ = find_layers(teacher)
    if keep[0] != 0 and _is_first_unlike(teacher):
        message = f"The first layer of a '{teacher.config.model_type}' is unlike the others: none can take its place."
        raise StageFailed("spec_invalid", message, suggestion=f"Keep layer 0, as in {[0, *keep[1:]]}.")
    student = type(teacher)._from_config(with_layers(teacher, keep), dtype=torch.float32)
    student.has_new_head = teacher.has_new_head
    student.load_state_dict(renumber(teacher.state_dict(), stack, keep))
    return student


def _is_first_unlike(model: PreTrainedModel) -> bool:
    """Returns whether the first layer has other tensors than the second, as a ModernBERT's, which lacks a norm."""
    names = [list(layer.state_dict()) for layer in model.get_submodule(find_layers(model)[0]).children()]
    return names[0] != names[min(1, len(names) - 1)]


def make_fresh(teacher: PreTrainedModel, sizes: "Fresh") -> PreTrainedModel:
    """Returns a model of the teacher's class in other sizes, with random weights.

    Raises:
        StageFailed: The architecture cannot have these sizes.
    """
    old = teacher.config
    if sizes.intermediate_size and _find_inner_width(old) is None:
        message = f"A '{old.model_type}' has feed-forward layers of a width that follows from its states."
        raise StageFailed("spec_invalid", message, suggestion="Leave student.intermediate_size out.")
    num_layers = sizes.num_layers or old.num_hidden_layers
    config = with_layers(teacher, [index % old.num_hidden_layers for index in range(num_layers)])
    widths = read_widths(old).resized(sizes.hidden_size, sizes.num_heads, sizes.intermediate_size)
    set_widths(config, widths)
    try:
        student = type(teacher)._from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError, AssertionError) as error:
        message = f"A '{old.model_type}' cannot have {widths.num_heads} heads and a width of {widths.states}: {error}"
        raise StageFailed("spec_invalid", message, suggestion="Choose a width that the heads divide.") from error
    student.has_new_head = True
    return student


def read_widths(config: PreTrainedConfig) -> Widths:
    """Returns the widths that a config says, or that its model takes where it leaves them out."""
    heads, name = config.num_attention_heads, _find_inner_width(config)
    return Widths(
        states=config.hidden_size,
        inner=(getattr(config, name) if name else None) or 4 * config.hidden_size,  # GPT-2 leaves it out
        head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        num_heads=heads,
        num_groups=getattr(config, "num_key_value_heads", None) or heads,
    )


def set_widths(config: PreTrainedConfig, widths: Widths) -> None:
    """Puts widths into a config, those that it has names for."""
    # of DeBERTa, ELECTRA and OPT, where they are as wide as the states
    for name in ("pooler_hidden_size", "embedding_size", "word_embed_proj_dim"):
        if getattr(config, name, None) == config.hidden_size and config.model_type != "albert":  # which has a map there
            setattr(config, name, widths.states)
    config.hidden_size, config.num_attention_heads = widths.states, widths.num_heads
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = widths.num_groups
    if vars(config).get("head_dim"):  # Falcon's follows from the others
        config.head_dim = widths.head
    inner = _find_inner_width(config)
    if inner:
        setattr(config, inner, widths.inner)


def _find_inner_width(config: PreTrainedConfig) -> str | None:
    """Returns what a config calls the width inside its feed-forward layers; None where it has no name for it."""
    return next((name for name in INNER_WIDTHS if hasattr(config, name)), None)


def with_layers(teacher: PreTrainedModel, keep: list[int]) -> PreTrainedConfig:
    """Returns the teacher's config with these of its layers."""
    config, num_layers = copy.deepcopy(teacher.config), teacher.config.num_hidden_layers
    for name, value in vars(teacher.config).items():
        if isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, [value[index] for index in keep])  # a setting for each layer, as `layer_types`
    config.num_hidden_layers = len(keep)
    return config


def renumber(state: dict[str, Tensor], stack: str, keep: list[int]) -> dict[str, Tensor]:
    """Returns the weights with layer `keep[i]` of the stack under number i, and the other layers left out."""
    new_index = {str(old): str(new) for new, old in enumerate(keep)}
    result = {}
    for name, tensor in state.items():
        if not name.startswith(f"{stack}."):
            result[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if number in new_index:
            result[f"{stack}.{new_index[number]}.{rest}"] = tensor
    return result
