"""Model folders of `transformers`: loading and saving, offline and without foreign code."""

import inspect
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.utils.parametrize import ParametrizationList
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from core.errors import StageFailed
from core.models import facts
from core.models.checking import WEIGHTS
from worker.engine.portable import write_model, write_tokenizer

OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
COMPLETE_FOLDER = "Upload the whole folder: config.json, safetensors and tokenizer, as save_pretrained writes them."
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
NO_LABELS = ["LABEL_0", "LABEL_1"]  # what stock `transformers` calls those of a model that has none
CHECKED_TOKENS = 8
BASE, ADAPTERS = "base", "adapters"  # folders of a model that is stored as it was, and of what is beside it
BRANCHES = "branches"  # folder of what each task has of its own; what they share is then in the first one
PROMPT = "prompt_encoder"  # as `peft` calls it
CUTTING = ("truncation", "padding")
OFFSETS = ("trim_offsets", "add_prefix_space")  # of a post-processor, which has its tokens by then
TRANSIENT_SETTINGS = ("local_files_only", "is_local", "max_length", "stride", "truncation_strategy")
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # its report of a missing head is ours to give


def load_classifier(
    folder: Path, labels: list[str], auto_class: Any = AutoModelForSequenceClassification, **options: Any
) -> PreTrainedModel:
    """Returns the folder's classifier over these labels, of texts or (by the class) of tokens, in float32 by default.

    A head over the same labels in another order is put in this order; a head over other labels, a missing one, or one
    of tokens where texts have classes, is new, and `has_new_head` says so. What lies beside the model, adapters or
    layers of tasks, is attached to it.

    Raises:
        StageFailed: `teacher_unavailable` when the folder cannot be loaded, or lacks weights of the encoder.
    """
    model, found, new_keys = _read(auto_class, folder, options | {"num_labels": len(labels)})
    _refuse_lost([key for key in new_keys if not is_head(model, key)])
    _settle_head(model, labels, found, new_keys)
    if model.config.pad_token_id is None and (folder / "tokenizer_config.json").is_file():
        model.config.pad_token_id = load_tokenizer(folder).pad_token_id  # by which decoders find the end of a row
    _attach(model, folder)
    return model


def load_language_model(folder: Path, **options: Any) -> PreTrainedModel:
    """Returns the folder's causal language model, in float32 by default.

    Raises:
        StageFailed: `teacher_unavailable` when the folder cannot be loaded, or lacks weights.
    """
    model, _, new_keys = _read(AutoModelForCausalLM, folder, options)
    _refuse_lost(new_keys)
    model.has_new_head = False
    _attach(model, folder)
    return model


def _attach(model: PreTrainedModel, folder: Path) -> None:
    if (folder / ADAPTERS).is_dir():
        from worker.engine.adapters import attach  # a library that most models do without

        attach(model, folder / ADAPTERS)
    if (folder / BRANCHES).is_dir():
        from worker.engine import branches

        branches.attach(model, folder / BRANCHES)


def _read(auto_class: Any, folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, list[str], set[str]]:
    """Returns the model, the labels that its folder names for such a head, and the names of the tensors it lacks."""
    own = _names_beside(folder)
    folder = folder / BASE if (folder / BASE).is_dir() else folder
    try:
        config = AutoConfig.from_pretrained(folder, **OFFLINE)
        model, info = auto_class.from_pretrained(
            folder,
            **OFFLINE | {"dtype": torch.float32} | options,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's own: no memory, no permission
            raise
        message = f"The model cannot be loaded: {str(error).splitlines()[0]}"
        raise StageFailed("teacher_unavailable", message, suggestion=COMPLETE_FOLDER) from error
    stored = facts.head_of((config.architectures or [""])[0])
    is_other = stored is not None and stored != facts.head_of(type(model).__name__)
    found = [] if is_other else [config.id2label[index] for index in sorted(config.id2label)]
    return model, found, (set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}) - own


def _names_beside(folder: Path) -> set[str]:
    """Returns the names of the weights that each of several tasks has of its own, beside what they share."""
    path = next((folder / BRANCHES).glob(f"*/{WEIGHTS}"), None)
    if path is None:
        return set()
    with safe_open(path, framework="pt") as file:
        return {*file.keys()}


def _refuse_lost(keys: Collection[str]) -> None:
    if keys:
        message = (
            f"The weights do not fit the config: {len(keys)} tensors of the model are missing, first '{min(keys)}'."
        )
        raise StageFailed("teacher_unavailable", message, suggestion=COMPLETE_FOLDER)


def refuse_new_head(model: PreTrainedModel, what: str, labels: list[str]) -> None:
    """Raises StageFailed, `teacher_unavailable`, if a model that is not to be trained has no head for the labels."""
    if model.has_new_head:
        message = f"The {what} has no head for the labels {', '.join(labels[:20])}."
        hint = "Name a model that was fine-tuned on these labels, as 'job:<id>/teacher'."
        raise StageFailed("teacher_unavailable", message, suggestion=hint)


def _settle_head(model: PreTrainedModel, labels: list[str], found: list[str], new_keys: set[str]) -> None:
    output = model.get_submodule(output_layer(model))
    is_missing = any(key.startswith(f"{output_layer(model)}.") for key in new_keys)
    is_same = sorted(found) == sorted(labels)
    model.has_new_head = is_missing or not is_same
    if not is_same and not is_missing:
        output.reset_parameters()
    elif not is_missing and found != labels:
        with torch.no_grad():
            for tensor in output.parameters():
                tensor.copy_(tensor[[found.index(label) for label in labels]].clone())
    name_labels(model, labels)


def name_labels(model: PreTrainedModel, labels: list[str]) -> None:
    """Has the config call the logits so, in their order."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Returns whether a parameter is of the head: outside the encoder, or in the pooler that only the head reads."""
    return not name.startswith((f"{model.base_model_prefix}.", f"{PROMPT}.")) or ".pooler." in name


def output_layer(model: PreTrainedModel) -> str:
    """Returns the name of the layer that makes the logits: the last linear one with an output a label."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels
    ]
    return names[-1]


def last_layers(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """Returns the layers outside of the trunk that have an output a label, or token: what makes logits, and copies."""
    num_outputs = model.config.vocab_size if model.can_generate() else model.config.num_labels
    heads = (child for name, child in model.named_children() if name != model.base_model_prefix)
    linear = (module for head in heads for module in head.modules() if isinstance(module, torch.nn.Linear))
    return [layer for layer in linear if layer.out_features == num_outputs]


def head_bias(model: PreTrainedModel) -> torch.Tensor | None:
    """Returns the bias of the layer that makes the logits, to be changed in place; None where it has none."""
    bias_C = model.get_submodule(output_layer(model)).bias
    return bias_C.detach() if isinstance(bias_C, torch.Tensor) else None


def some_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Returns a few tokens that the model has, ids_BT, by which can be seen how it computes."""
    return torch.arange(CHECKED_TOKENS, device=model.device)[None] % model.config.vocab_size


def find_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Returns the name of the model's list of layers, and its length."""
    num_layers = getattr(model.config, "num_hidden_layers", None)
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and not isinstance(module, ParametrizationList)  # which is one, too, in a weight
        and len(module) == num_layers
        and _is_uniform(module)
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


def _is_uniform(layers: torch.nn.ModuleList) -> bool:
    return len({type(layer) for layer in layers}) == 1


def find_rope(config: PreTrainedConfig) -> str:
    """Returns the kind of rotary positions of a decoder, `default` where it has none or says nothing of them."""
    kind: str = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return kind


def find_window(config: PreTrainedConfig) -> int | None:
    """Returns to how many tokens a decoder's attention is limited, if they are fewer than it has places for."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if window is not None and window < config.max_position_embeddings else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns the folder's tokenizer; one without a padding token pads with its end token.

    Its `model_max_length` is at most what the model beside it has positions for.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, **OFFLINE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = folder / "config.json"
    longest = facts.count_positions(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else None
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest or sys.maxsize)
    return tokenizer


def is_same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Returns whether two tokenizers make the same tokens of every text, but for where they cut it."""
    return _what_makes_tokens(first) == _what_makes_tokens(second)


def _what_makes_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    last = found["post_processor"] or {}
    for part in (last, *last.get("processors", ())):
        for name in OFFSETS:
            part.pop(name, None)
    return {name: part for name, part in found.items() if name not in CUTTING}


def save_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: list[str], folder: Path
) -> None:
    """Writes weights (safetensors), config, tokenizer and labels; the same model gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    _save_weights(model, folder)
    save_tokenizer(tokenizer, folder)
    save_labels(labels, folder)


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights and config; where some are to stay beside the model, so that no one takes it for the whole."""
    if hasattr(model, "apart"):
        model.apart.save_apart(folder)
    else:
        write_model(model, folder)


def save_trunk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a classifier without its head and what the config says of it, as one that was only pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    trunk = model.base_model
    name_labels(trunk, NO_LABELS)
    trunk.config.problem_type = None
    if hasattr(trunk.config, "tasks"):
        del trunk.config.tasks
    write_model(trunk, folder)
    save_tokenizer(tokenizer, folder)


def save_language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights (safetensors), config and tokenizer; the same model gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_weights(model, folder)
    save_tokenizer(tokenizer, folder, truncate=False)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, truncate: bool = True) -> None:
    """Writes the tokenizer; a reader of its `tokenizer.json` alone cuts at the same length, and pads as it likes."""
    backend = tokenizer.backend_tokenizer
    if truncate:
        backend.enable_truncation(tokenizer.model_max_length)
    else:
        backend.no_truncation()
    backend.no_padding()
    for name in TRANSIENT_SETTINGS:
        tokenizer.init_kwargs.pop(name, None)
    write_tokenizer(tokenizer, folder)


def save_labels(labels: list[str], folder: Path) -> None:
    """Writes `labels.json`, the class names in the order of the logits."""
    (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def count_positions(model: Any) -> int | None:
    """Returns how many tokens of a text a model, or what has the config of one, can read; None without a limit."""
    return getattr(model.config, "max_position_embeddings", None) or None


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns what the tokenizer makes and the model takes, in a fixed order."""
    accepted = inspect.signature(model.forward).parameters
    return [name for name in INPUT_NAMES if name in accepted and name in tokenizer.model_input_names]


def limit_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Sets the tokenizer's longest input to what is asked, and at most what the model has positions for."""
    longest = count_positions(model) or max_length
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, torch.nn.Embedding)
            and module.padding_idx is not None
        ):
            longest -= module.padding_idx + 1  # RoBERTa counts its positions from there
    tokenizer.model_max_length = min(max_length, longest, tokenizer.model_max_length)
