"""Students, and how they are made from their teacher."""

import copy
import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.context import StageContext

log = logging.getLogger(__name__)


def load_student(ctx: StageContext) -> PreTrainedModel:
    """Returns the student that an earlier stage made, or else the one that the spec describes."""
    student: PreTrainedModel = ctx.load_model("student") if ctx.has_input("student") else ctx.spec.student.build(ctx)
    return student


def load_student_tokenizer(ctx: StageContext) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of what the student was made from."""
    return ctx.load_tokenizer(next(role for role in ("student", "base", "teacher") if ctx.has_input(role)))


def keep_layers(teacher: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """Returns a model of the teacher's class with these layers of it, renumbered from 0, and all its other weights.

    The student is built from a changed config and filled by name, so that stock `transformers` builds it again.

    Raises:
        StageFailed: The model keeps its layers in no single list as long as its config says.
    """
    stack, num_layers = find_layers(teacher)
    config = copy.deepcopy(teacher.config)
    for name, value in vars(teacher.config).items():
        if isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, [value[index] for index in keep])  # a setting for each layer, as `layer_types`
    config.num_hidden_layers = len(keep)
    student = type(teacher)._from_config(config, dtype=torch.float32)
    student.has_new_head = teacher.has_new_head
    student.load_state_dict(renumber(teacher.state_dict(), stack, keep))
    log.info("kept layers %s of %s", keep, stack)
    return student


def find_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Returns the name of the model's list of layers, and its length."""
    num_layers = getattr(model.config, "num_hidden_layers", None)
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers and _is_uniform(module)
    ]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if num_layers is None or len(outer) != 1:
        raise StageFailed(
            "spec_invalid",
            f"A '{model.config.model_type}' keeps its {num_layers} layers in {len(outer)} lists; layers can be kept "
            "only where there is one.",
            suggestion="Choose another kind of student.",
        )
    return outer[0], num_layers


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


def _is_uniform(layers: torch.nn.ModuleList) -> bool:
    return len({type(layer) for layer in layers}) == 1
