"""Language models as one file of llama.cpp's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Form
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.exporting import get_reference, measure_agreement
from worker.engine.inference import as_answer
from worker.engine.loading import OFFLINE, find_rope, find_window
from worker.engine.pieces import BYTE_TOKENS, list_merges
from worker.engine.quantizing import read_grids
from worker.kernels.grids import Grid, divide, encode

if TYPE_CHECKING:
    from worker.methods.exporters.gguf import Gguf

FORMS = {"f32": Form.F32, "f16": Form.F16, "q8_0": Form.Q8_0, "q4_0": Form.Q4_0}
BLOCK = 32
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# How texts are cut into words before bytes are merged, by llama.cpp's names.
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {LLAMA_WORDS: "llama-bpe", LLAMA_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def write_gguf(ctx: StageContext, settings: "Gguf", folder: Path) -> dict[str, float]:
    """Writes the student as GGUF, reads it again with `transformers`, and returns how far it agrees.

    Raises:
        StageFailed: `export_unsupported` where the model or its tokenizer is of a kind that is not known, `goal_missed`
            when too few tokens agree.
    """
    reference = get_reference(ctx)
    grids = read_grids(ctx.input("student"))
    write_file(reference.model, reference.tokenizer, folder / "model.gguf", settings.weights, grids)
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, **OFFLINE)
    answers = ctx.task.logits(as_answer(again), reference.data, ctx.check_stop)
    return measure_agreement(ctx, reference, answers, "gguf", settings.min_agreement)


def write_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, weights: str, grids: dict[str, Grid]
) -> None:
    """Writes a model with its tokenizer as GGUF; matrices on a grid that the file has a form for keep their codes."""
    config = model.config
    _check(config)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            grid = grids.get(name)
            if grid:
                grid = Grid(_turn(name, grid.scale_OG, config), _turn(name, grid.zero_OG, config), grid.bits)
            _add_tensor(writer, str(own), _turn(name, tensor, config), weights, grid)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: PreTrainedConfig) -> None:
    """Raises StageFailed for what the file could not say."""
    rope, window = find_rope(config), find_window(config)
    what = (
        f"the architecture '{config.model_type}'"
        if config.model_type not in ARCHITECTURES
        else f"positions of kind '{rope}'"
        if rope != "default"
        else f"a window of {window} tokens"
        if window
        else None
    )
    if what:
        raise _unsupported(f"GGUF is not written for {what}.")


def _unsupported(message: str) -> StageFailed:
    return StageFailed("export_unsupported", message, suggestion="Leave the form gguf out.")


def _add_sizes(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _turn(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Returns queries and keys of a Llama in llama.cpp's order.

    It turns neighbours (2i, 2i + 1), and transformers the two halves of a head (i, i + D/2).
    """
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    num_heads = next((number for part, number in turned.items() if part in name), None)
    if num_heads is None or ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA:
        return tensor
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, weights: str, grid: Grid | None) -> None:
    kept = _find_form(tensor, grid) if grid else None
    if grid and kept:
        writer.add_tensor(name, _pack(encode(tensor.float(), grid), grid, kept), raw_dtype=kept)
        return
    data = np.ascontiguousarray(tensor.float().numpy())
    form = FORMS[weights] if data.ndim > 1 else Form.F32
    if form == Form.Q4_0 and name.startswith(("token_embd", "output")):
        form = Form.Q8_0  # what tokens begin and end with suffers most
    if form in (Form.Q8_0, Form.Q4_0) and data.shape[-1] % BLOCK:
        form = Form.F16
    writer.add_tensor(name, gguf.quants.quantize(data, form), raw_dtype=form)


def _find_form(weight_OI: Tensor, grid: Grid) -> Form | None:
    """Returns the form that has a code and a scale for each weight of a grid, if there is one."""
    width = weight_OI.shape[1] // grid.scale_OG.shape[1]
    is_symmetric = bool((grid.zero_OG == 2 ** (grid.bits - 1)).all())
    if width % BLOCK or grid.bits not in (4, 8) or (grid.bits == 8 and not is_symmetric):
        return None
    return Form.Q8_0 if grid.bits == 8 else Form.Q4_0 if is_symmetric else Form.Q4_1


def _pack(codes_OI: Tensor, grid: Grid, form: Form) -> NDArray[np.uint8]:
    """Returns the bytes of each row: of each block of 32 its scale, the value of code 0 where it has one, the codes."""
    codes_OBN = codes_OI.to(torch.uint8).unflatten(1, (-1, BLOCK)).numpy()
    blocks = divide(grid, codes_OBN.shape[1] // grid.scale_OG.shape[1])
    scale_OB, zero_OB = blocks.scale_OG.numpy(), blocks.zero_OG.numpy()
    head = [scale_OB] if form != Form.Q4_1 else [scale_OB, -scale_OB * zero_OB]
    if form == Form.Q8_0:
        body_OBN = (codes_OBN - np.uint8(128)).view(np.uint8)
    else:
        low_OBN, high_OBN = np.split(codes_OBN, 2, axis=-1)
        body_OBN = low_OBN | (high_OBN << 4)
    heads = [value.astype(np.float16)[..., None].view(np.uint8) for value in head]
    return np.concatenate([*heads, body_OBN], axis=-1).reshape(len(codes_OBN), -1)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> None:
    contents = json.loads(tokenizer.backend_tokenizer.to_str())
    model = contents["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"GGUF is not written for a tokenizer of kind '{model['type']}'.")
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [names.get(index, f"[unused {index}]") for index in range(num_tokens)]
    added = {token["content"]: token["special"] for token in contents["added_tokens"]}
    kinds = [_kind(token, index in names, added, model) for index, token in enumerate(tokens)]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(list_merges(model), 1)])}
        writer.add_token_scores([ranks.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_find_words(contents["pre_tokenizer"]))
        writer.add_token_merges([" ".join(pair) for pair in list_merges(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for role in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    first, *_, last = tokenizer("a b")["input_ids"]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)
    writer.add_add_eos_token(last == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _kind(token: str, is_known: bool, added: dict[str, bool], model: dict[str, Any]) -> gguf.TokenType:
    if not is_known:
        return gguf.TokenType.UNUSED
    if token == model.get("unk_token"):
        return gguf.TokenType.UNKNOWN
    if token in added:
        return gguf.TokenType.CONTROL if added[token] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if model.get("byte_fallback") and token in BYTE_TOKENS else gguf.TokenType.NORMAL


def _find_words(pre_tokenizer: dict[str, Any]) -> str:
    """Returns llama.cpp's name for how a text is cut into words. Raises StageFailed if it has none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if not splits and last.get("use_regex", True):
            return "gpt-2"
        if len(splits) == 1 and splits[0] in WORDS:
            return WORDS[splits[0]]
    raise _unsupported("GGUF is not written for a tokenizer that cuts texts into words as this one does.")
