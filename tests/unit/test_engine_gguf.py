"""Language models as one file for llama.cpp: read again by `transformers`, and run by llama.cpp itself."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gguf import GGMLQuantizationType as Form
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from core.errors import StageFailed
from core.jobs.spec import load_spec
from core.methods import ModelFacts
from tests.engine_bench import Bench, make_spec
from tests.llama_cpp import STORIES, needs_stories, serving, write_gguf
from tests.unit.test_engine_trimming import trained
from worker.engine.gguf_files import _find_words, write_file
from worker.engine.loading import load_language_model, load_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = [LlamaConfig, Qwen2Config, Qwen3Config]
PROMPT = "Once upon a time, the courier's 12 parcels were late; "


def write_model(folder: Path, config_class: Any, *, is_tied: bool = False) -> Path:
    """Writes a random model whose tokens are merged from bytes."""
    tokenizer = trained("bytes")
    torch.manual_seed(0)
    config = config_class(**SIZES, vocab_size=len(tokenizer), tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # else biases are zero, and would be missed by nobody
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def find_answers(model: Any, tokenizer: Any) -> Iterator[tuple[str, list[int], torch.Tensor]]:
    """Yields prompts that are followed by a letter and not by part of one, of which the server would tell nothing."""
    for end in range(len(PROMPT), 1, -1):
        ids = tokenizer(PROMPT[:end])["input_ids"]
        with torch.no_grad():
            log_p_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        first = log_p_V.argmax().item()
        if first not in tokenizer.all_special_ids and tokenizer.decode([first]).strip().isalpha():
            yield PROMPT[:end], ids, log_p_V


def compare_with_llama_cpp(folder: Path, file: Path, tolerance: float) -> None:
    """Tokens of a prompt are the same, and so are the probabilities of what follows it."""
    model, tokenizer = load_language_model(folder).eval(), load_tokenizer(folder)
    prompt, ids, expected = next(find_answers(model, tokenizer))
    with serving(file) as url, httpx.Client(base_url=url, timeout=60) as client:
        told = client.post("/tokenize", json={"content": prompt, "add_special": True}).json()["tokens"]
        body = {"prompt": ids, "n_predict": 1, "n_probs": 50, "temperature": 0}
        found = client.post("/completion", json=body).json()["completion_probabilities"][0]["top_logprobs"]
    assert told == ids
    for one in found:
        assert math.isclose(one["logprob"], expected[one["id"]].item(), abs_tol=tolerance), one


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda one: one.model_type)
def test_llama_cpp_computes_what_transformers_does(config_class: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", config_class, is_tied=config_class is Qwen3Config)
    compare_with_llama_cpp(folder, write_gguf(folder, tmp_path / "model.gguf"), 2e-3)


@needs_stories
@pytest.mark.parametrize(("weights", "tolerance"), [("f32", 2e-3), ("f16", 2e-2), ("q8_0", 0.2)])
def test_a_real_model_says_the_same_in_every_form(weights: str, tolerance: float, tmp_path: Path) -> None:
    compare_with_llama_cpp(STORIES, write_gguf(STORIES, tmp_path / "model.gguf", weights), tolerance)


def test_a_job_exports_each_form_that_still_says_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    write_model(bench.inputs / "teacher", LlamaConfig)
    forms = [{"weights": "f32"}, {"weights": "q8_0"}, {"weights": "q4_0", "min_agreement": 0.1}, {"weights": "q4_0"}]
    stages = [{"kind": "export", "formats": [{"kind": "gguf", **form}]} for form in forms]
    student = {"kind": "teacher_layers", "keep": [0, 1]}
    task = {"kind": "causal_lm", "block_tokens": 32}
    spec = make_spec([{"kind": "distill", "epochs": 0.5}, *stages], task=task, student=student)
    bench.adopt(bench.succeed(spec, 0, labels=[]), 0, "distill")
    done = [bench.succeed(spec, ordinal, labels=[]) for ordinal in (1, 2, 3)]
    measured = [one.last["summary"]["formats"]["gguf"] for one in done]
    files = [one.outputs / "gguf" / "model.gguf" for one in done]
    assert measured[0]["max_logit_difference"] < 1e-4
    assert 1 > measured[1]["agreement"] > measured[2]["agreement"]
    sizes = [path.stat().st_size for path in files]
    assert sizes[0] > 2.5 * sizes[1]
    assert sizes[1] > sizes[2]
    again = bench.succeed(spec, 1, "again", labels=[]).outputs / "gguf" / "model.gguf"
    assert again.read_bytes() == files[0].read_bytes()
    refused = bench.run(spec, 4, labels=[])  # a random model's answers hang by a hair, and 4 bits change most of them
    assert (refused.last["type"], refused.last["reason"]) == ("error", "goal_missed")
    assert "min_agreement is 90.00%" in refused.last["message"]


@pytest.mark.parametrize(
    ("settings", "form", "tolerance"),
    [
        ({"bits": 4, "symmetric": True}, Form.Q4_0, 1e-4),
        ({"bits": 8, "symmetric": True, "group": None}, Form.Q8_0, 1e-4),
        ({"bits": 4}, Form.Q4_1, 0.05),  # its zero points are not whole
        ({"bits": 3}, Form.F32, 1e-4),
    ],
    ids=str,
)
def test_a_quantised_model_keeps_its_codes(
    settings: dict[str, Any], form: Form, tolerance: float, tmp_path: Path
) -> None:
    bench = Bench(tmp_path).lay_language()
    write_model(bench.inputs / "teacher", LlamaConfig)
    stages = [
        {"kind": "quantize", "group": 32, **settings},
        {"kind": "export", "formats": [{"kind": "gguf", "weights": "f32"}]},
    ]
    student, task = {"kind": "teacher_layers", "keep": [0, 1]}, {"kind": "causal_lm", "block_tokens": 32}
    done = bench.succeed_all(make_spec(stages, task=task, student=student), labels=[])
    assert done[1].last["summary"]["formats"]["gguf"]["max_logit_difference"] < tolerance
    file = done[1].outputs / "gguf" / "model.gguf"
    forms = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert {forms[f"blk.{layer}.{name}.weight"] for layer in (0, 1) for name in ("attn_q", "attn_v", "ffn_down")} == {
        form
    }
    compare_with_llama_cpp(done[0].outputs / "student", file, 0.3)


@pytest.mark.parametrize("is_tied", [False, True])
def test_each_tensor_keeps_its_own_bits(is_tied: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    write_model(bench.inputs / "teacher", LlamaConfig, is_tied=is_tied)
    settings = {"group": 32, "bits": 4, "symmetric": True, "embedding_bits": 8, "sensitive_share": 0.4}
    stages = [
        {"kind": "quantize", **settings, "method": {"kind": "awq"}},
        {"kind": "export", "formats": [{"kind": "gguf", "weights": "f32"}]},
    ]
    student, task = {"kind": "teacher_layers", "keep": [0, 1]}, {"kind": "causal_lm", "block_tokens": 32}
    done = bench.succeed_all(make_spec(stages, task=task, student=student), labels=[])
    assert done[1].last["summary"]["formats"]["gguf"]["max_logit_difference"] < 1e-4
    file, bits = done[1].outputs / "gguf" / "model.gguf", done[0].last["summary"]["bits"]
    forms = Counter(tensor.tensor_type for tensor in GGUFReader(file).tensors if tensor.tensor_type != Form.F32)
    assert forms == Counter({4: Form.Q4_0, 8: Form.Q8_0}[number] for number in bits.values())
    assert len(forms) == 2
    assert bits["model.embed_tokens.weight"] == 8
    compare_with_llama_cpp(done[0].outputs / "student", file, 0.3)


def test_what_the_file_cannot_say_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", LlamaConfig)
    model, tokenizer = load_language_model(folder), load_tokenizer(folder)
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4}
    with pytest.raises(StageFailed, match="positions of kind 'llama3'"):
        write_file(model, tokenizer, tmp_path / "model.gguf", "f32", {})
    with pytest.raises(StageFailed, match="cuts texts into words"):
        _find_words({"type": "Whitespace"})


def test_an_architecture_that_lacks_the_form_is_refused_at_submit() -> None:
    stages = [{"kind": "distill"}, {"kind": "export", "formats": [{"kind": "safetensors"}, {"kind": "gguf"}]}]
    student = {"kind": "teacher_layers", "keep": [0]}
    spec = load_spec(
        {"task": {"kind": "causal_lm"}, "teacher": {"model": "m"}, "student": student, "data": "d", "stages": stages}
    )
    assert spec.stages[1].check_model(spec, ModelFacts(model_type="llama")) == []
    [problem] = spec.stages[1].check_model(spec, ModelFacts(model_type="gpt2"))
    assert (problem.field, problem.message) == ("formats.1", "'gguf' is not written for a 'gpt2'; leave it out")


def test_a_language_model_is_exported_as_safetensors_unless_more_is_asked() -> None:
    student = {"kind": "teacher_layers", "keep": [0]}
    spec = load_spec({"task": {"kind": "causal_lm"}, "teacher": {"model": "m"}, "student": student, "data": "d"})
    whole = {"kind": "safetensors", "dtype": "float32", "min_agreement": 0.95}
    assert json.loads(spec.model_dump_json())["stages"][2]["formats"] == [whole]
