"""A real llama.cpp server on loopback, which tells log probabilities, with the real tiny Llama as a GGUF file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"the real tiny Llama is not at {STORIES}")


def write_gguf(folder: Path, path: Path) -> Path:
    """Writes a Llama with the tokenizer of sentencepiece's kind as one file, in float32, and returns its path."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_chat_template(CHAT)
    _add_tokens(writer, json.loads((folder / "tokenizer.json").read_text()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    turned = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weights in load_file(folder / "model.safetensors").items():
        num_heads = next((number for part, number in turned.items() if part in name), None)
        if num_heads:  # llama.cpp turns neighbours (2i, 2i + 1), transformers the two halves of a head (i, i + D/2)
            weights = weights.reshape(num_heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    """Adds the tokens by id; those that are merged first come first, so that less the id is a score."""
    tokens = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in tokenizer["added_tokens"]} - {tokenizer["model"]["unk_token"]}
    kinds = {tokenizer["model"]["unk_token"]: gguf.TokenType.UNKNOWN} | dict.fromkeys(special, gguf.TokenType.CONTROL)
    kinds |= {f"<0x{byte:02X}>": gguf.TokenType.BYTE for byte in range(256)}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_scores([float(-index) for _, index in tokens])
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token, _ in tokens])
    writer.add_bos_token_id(tokenizer["model"]["vocab"]["<s>"])
    writer.add_eos_token_id(tokenizer["model"]["vocab"]["</s>"])
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """Yields the address of a server of a GGUF file: four answers at a time, all numbers in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.endpoint_metrics = True
    params.verbosity = 0
    server = xllamacpp.Server(params)
    try:
        yield server.listening_address
    finally:
        del server  # it ends with its object
