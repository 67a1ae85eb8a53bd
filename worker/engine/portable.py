"""Folders of `transformers` that its majors 4 (since 4.57) and 5 read to the same model and the same tokens.

Major 5 has other names for some settings. Major 4 takes its defaults for those that it does not find, and says nothing,
so they are written under both names. A tokenizer gets the one class that adds nothing, in either major, to what stands
in `tokenizer.json`.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PLAIN_TOKENIZER = "PreTrainedTokenizerFast"
OF_TOKENIZER_CLASS = ("model_input_names", "padding_side", "truncation_side")
THETA, PART, KIND = "rope_theta", "partial_rotary_factor", "rope_type"  # of rotary positions
LAYERS = ("full_attention", "sliding_attention")
# What major 4 calls the settings of some kinds of models, by what major 5 calls them.
TOKENS_OF_XLM = {"pad_token_id": "pad_index", "eos_token_id": "eos_index", "bos_token_id": "bos_index"}
ROPE_OF_NEOX = {THETA: "rotary_emb_base", PART: "rotary_pct"}
RENAMED = {
    "flaubert": TOKENS_OF_XLM,
    "gpt_neox": ROPE_OF_NEOX,
    "gpt_neox_japanese": ROPE_OF_NEOX,
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "xlm": TOKENS_OF_XLM,
}
# What it calls the bases of rotary positions, where layers that see all tokens have another than the rest.
THETAS = {
    "gemma3_text": (THETA, "rope_local_base_freq"),
    "gemma3n_text": (THETA, "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": (THETA, THETA),
}
MODERNBERTS = ("modernbert", "modernbert-decoder")


def write_model(part: PreTrainedModel | PreTrainedConfig, folder: Path, **options: Any) -> None:
    """Writes a model, or its config alone; the options are those of `save_pretrained`."""
    part.save_pretrained(folder, **options)
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    kind = config["model_type"]
    found = config | _describe_rope(kind, config.get("rope_parameters") or {})
    named = {old: found[new] for new, old in RENAMED.get(kind, {}).items() if new in found}
    _write(path, found | named | (_describe_layers(config) if kind in MODERNBERTS else {}))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer, and beside it what its class says of it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) | {name: getattr(tokenizer, name) for name in OF_TOKENIZER_CLASS}
    split = tokenizer.backend_tokenizer.pre_tokenizer
    state = json.loads(split.__getstate__()) if split else {}
    if "add_prefix_space" in state:  # which major 4 would change to its default
        settings["add_prefix_space"] = state["add_prefix_space"]
    if "extra_special_tokens" in settings:
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write(path, settings | {"tokenizer_class": PLAIN_TOKENIZER})


def _describe_rope(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Returns what major 4 reads instead of `rope_parameters`."""
    if kind in THETAS:
        named = {name: rope[layers][THETA] for name, layers in zip(THETAS[kind], LAYERS, strict=True)}
        rope = rope[LAYERS[0]]
    else:
        named = {name: rope[name] for name in (THETA, PART) if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in (THETA, PART)}
    is_scaled = scaling.get(KIND, "default") != "default" and kind not in MODERNBERTS
    return named | ({"rope_scaling": scaling} if is_scaled else {})


def _describe_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what major 4 reads of the layers of a ModernBERT, which is nothing, so that it stops, if it has no words.

    It takes a full layer after each so many, with two kinds of positions in an encoder and one in a decoder, unscaled.
    """
    whole, near = (config["rope_parameters"][kind] for kind in LAYERS)
    is_plain = whole[KIND] == near[KIND] == "default"
    if config["model_type"] == "modernbert-decoder":
        return {} if is_plain and whole == near else {"global_rope_theta": None}
    count = len(config["layer_types"])
    full = [index for index, layer in enumerate(config["layer_types"]) if layer == LAYERS[0]]
    steps = [step for step in range(1, count + 1) if [*range(0, count, step)] == full]
    return {"global_attn_every_n_layers": steps[0] if is_plain and steps else None}


def _write(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
