"""Adapters: a few weights that are trained beside those of a model, and kept apart from it or made part of it."""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import Linear, Module, ModuleDict, Parameter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from core.models.facts import TEXT_HEAD, WORD_HEAD, head_of
from worker.engine.loading import ADAPTERS, BASE, PROMPT, find_layers, is_head
from worker.engine.portable import write_model
from worker.engine.sharding import is_sharded

if TYPE_CHECKING:
    from core.compressing import Adapter, MatrixAdapter
    from worker.engine.context import StageContext

ONLY = "default"  # what the library calls the one adapter of a model, whose files lie in no folder of its own
OWN_WEIGHTS = ("lora_", "ia3_", ".modules_to_save.", f"{PROMPT}.")
WRAPPED = (".base_layer", ".original_module")
log = logging.getLogger(__name__)


class Adapted:
    """A model with an adapter, or one for each of several tasks, which is all that is trained of it, with the head.

    The model itself is changed in place, so that whoever holds it trains the adapter. Where this is not to become part
    of its weights, the model knows of it as `apart`.
    """

    def __init__(self, model: PreTrainedModel, wrapped: PeftModel, tasks: Iterable[str], *, is_merged: bool) -> None:
        self._model, self._wrapped, self._tasks, self._is_merged = model, wrapped, [*tasks], is_merged
        self._turned_to, self.trains = "", False
        is_read = wrapped.active_peft_config.is_prompt_learning
        self._prompts = _prepend(model, wrapped.prompt_encoder) if is_read else None
        if not is_merged:
            model.apart = self

    def start(self) -> int:
        """Lets all adapters be trained, each by what is computed with it; returns their number of weights."""
        self.trains = True
        found: dict[str, Parameter] = {}
        for task in self._tasks or [""]:
            self.turn(task)
            found |= {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}
        for weight in found.values():
            weight.requires_grad_(True)
        self._turned_to = ""
        return sum(weight.numel() for weight in found.values())

    def turn(self, task: str) -> None:
        """Has the model compute with the adapter of a task."""
        if self._tasks and task != self._turned_to:
            self._wrapped.set_adapter(_called(task), inference_mode=not self.trains)
            if self._prompts is not None:
                self._prompts.turned_to = _called(task)
            self._turned_to = task

    def save(self, folder: Path) -> None:
        """Writes the adapter and the head as `peft` reads them, those of several tasks in a folder each."""
        self._wrapped.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # an empty form of the library
        for task in self._tasks:
            (folder / _called(task)).rename(folder / task)

    def save_apart(self, folder: Path) -> None:
        """Writes the model as it was, once, and the adapters beside it: together what `attach` makes this model of."""
        state = self._model.state_dict()
        base = {_base_name(name): x for name, x in state.items() if not any(own in name for own in OWN_WEIGHTS)}
        write_model(self._model, folder / BASE, state_dict=base)
        self.save(folder / ADAPTERS)

    def settle(self) -> None:
        """Makes the adapter part of the model's own weights, if it is to be that."""
        self.trains = False
        if self._is_merged:
            self._wrapped.merge_and_unload(safe_merge=True)

    def single(self, task: str) -> PreTrainedModel:
        """Returns a copy of the model with the adapter of a task in its own weights."""
        self.turn(task)
        made: PreTrainedModel = copy.deepcopy(self._wrapped).merge_and_unload(safe_merge=True)
        del made.apart
        return made


def adapt(ctx: "StageContext", model: PreTrainedModel, adapter: "Adapter") -> Adapted:
    """Gives a model an adapter, or one for each task that shares nothing but what is frozen.

    Raises:
        StageFailed: `spec_invalid` for a model that cannot have it.
    """
    if is_sharded(model):
        message = "A model whose layers are split among processes gets no adapter."
        raise StageFailed("spec_invalid", message, suggestion="Leave the adapter out, or run it without that.")
    tasks, configure = [*ctx.task.heads] if ctx.spec.task.adapts_each else [], adapter.build(ctx)
    configs = {name: configure(model) for name in [_called(task) for task in tasks] or [ONLY]}
    (first, config), *others = configs.items()
    wrapped = get_peft_model(model, config, first)
    for name, config in others:
        wrapped.add_adapter(name, config)
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = ""  # else the library names a folder of this worker
    return Adapted(model, wrapped, tasks, is_merged=adapter.is_merged and not tasks)


def attach(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the adapters that were saved beside it."""
    first, *others = sorted(path.parent for path in folder.rglob("adapter_config.json"))
    tasks = [] if first == folder else [path.name for path in (first, *others)]
    wrapped = PeftModel.from_pretrained(model, str(first), _called(tasks[0]) if tasks else ONLY)
    for path in others:
        wrapped.load_adapter(str(path), _called(path.name))
    adapted = Adapted(model, wrapped, tasks, is_merged=False)
    if tasks:
        adapted.turn(tasks[0])


def _called(task: str) -> str:
    """Returns what the library calls the adapter of a task: not its name, which an attribute may have."""
    return f"of_{task}"


def _base_name(name: str) -> str:
    """Returns what a weight of the model is called without adapters."""
    for part in WRAPPED:
        name = name.replace(part, "")
    return name


class Prompts(Module):
    """The vectors that a model reads before every text: those of one task at a time, where each has its own."""

    def __init__(self, encoders: ModuleDict) -> None:
        super().__init__()
        self.encoders, self.turned_to = encoders, next(iter(encoders))

    def forward(self) -> Tensor:
        """Returns prompt_PD."""
        return self.encoders.get_parameter(f"{self.turned_to}.embedding.weight")


def _prepend(model: PreTrainedModel, encoders: ModuleDict) -> Prompts:
    """Has a model read a prompt before every text, as the library does, and answer for the text's tokens alone."""
    prompts = Prompts(encoders)
    model.add_module(PROMPT, prompts)

    def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids_BT, prompt_PD = kwargs["input_ids"], module.get_submodule(PROMPT)()
        prompt_BPD = prompt_PD.expand(len(ids_BT), *prompt_PD.shape)
        text_BTD = module.get_input_embeddings()(ids_BT)
        given = {name: value for name, value in kwargs.items() if name != "input_ids"}
        for name, filler in (("attention_mask", 1), ("token_type_ids", 0)):
            if given.get(name) is not None:
                given[name] = torch.nn.functional.pad(given[name], (len(prompt_PD), 0), value=filler)
        return args, given | {"inputs_embeds": torch.cat([prompt_BPD, text_BTD], dim=1)}

    def cut(module: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG001 - as the library calls it
        if output.logits.dim() == 3:
            output.logits = output.logits[:, len(module.get_submodule(PROMPT)()) :]
        return output

    model.register_forward_pre_hook(give, with_kwargs=True)
    model.register_forward_hook(cut, with_kwargs=True)
    return prompts


def find_matrices(model: PreTrainedModel, adapter: "MatrixAdapter") -> list[str]:
    """Returns the names of the matrices that get an adapter.

    Raises:
        StageFailed: `spec_invalid` for a layer that is not there.
    """
    stack, count = find_layers(model)
    layers = range(count) if adapter.layers is None else adapter.layers
    missing = [layer for layer in layers if not 0 <= layer < count]
    if missing:
        message = f"Layer {missing[0]} gets no adapter: the model has {count} layers, counted from 0."
        raise StageFailed("spec_invalid", message, suggestion="Choose from those that there are.")
    return [
        f"{stack}.{layer}.{name}"
        for layer in layers
        for name, module in model.get_submodule(f"{stack}.{layer}").named_modules()
        if isinstance(module, Linear | Conv1D)
        and adapter.parts in {"all", _part_of(model, f"{stack}.{layer}.{name}", below=f"{stack}.{layer}")}
    ]


def _part_of(model: PreTrainedModel, name: str, below: str) -> str:
    """Returns whether a matrix of a layer is of its attention or of its feed-forward part."""
    while (name := name.rpartition(".")[0]) != below:
        if "Attention" in type(model.get_submodule(name)).__name__:
            return "attention"
    return "feed_forward"


def find_head(model: PreTrainedModel) -> list[str]:
    """Returns the names of what is trained as a whole: what has weights outside of the encoder, and in its pooler."""
    last = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if is_head(model, f"{name}.") and module is not last and any(True for _ in module.parameters(recurse=False))
    ]


def find_task_type(model: PreTrainedModel) -> str:
    """Returns what the library calls the task of a model's class, which says how it gives it a prompt."""
    return {TEXT_HEAD: "SEQ_CLS", WORD_HEAD: "TOKEN_CLS", None: "CAUSAL_LM"}[head_of(type(model).__name__)]
