"""Language models as ONNX: run by onnxruntime with and without a cache, and compared with stock `transformers`."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from core.errors import StageFailed
from core.jobs.spec import load_spec
from core.methods import ModelFacts
from core.registry import list_methods
from stillhouse.classifier import Classifier
from stillhouse.errors import InvalidInput
from tests import pico
from tests.engine_bench import Bench, contents, make_spec
from worker.engine import exporting, runtimes
from worker.engine.context import Order, StageContext
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter
from worker.methods.tasks.causal_lm import CausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[..., Any]] = {
    "gemma": lambda **options: GemmaConfig(**GROUPED, **options),
    "gpt2": lambda **options: GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.2, **options
    ),
    "gpt_neox": lambda **options: GPTNeoXConfig(**SIZES, **options),
    "llama": lambda **options: LlamaConfig(**GROUPED, **options),
    "mistral": lambda **options: MistralConfig(**GROUPED, **{"sliding_window": None} | options),
    "phi3": lambda **options: Phi3Config(**GROUPED, **options),
    "qwen2": lambda **options: Qwen2Config(**SIZES, num_key_value_heads=2, **options),
    "qwen3": lambda **options: Qwen3Config(**GROUPED, **options),
    "smollm3": lambda **options: SmolLM3Config(**GROUPED, **options),
}
TASK = {"kind": "causal_lm", "block_tokens": 32}
STUDENT = {"kind": "teacher_layers", "keep": [0, 1]}
TEXTS = ["my parcel", "please help with the login code"]
NUM_NEW = 10


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Callable[..., StageContext]]:
    """Gives a stage that has a student of some config, made at random."""
    made: list[StageContext] = []

    def make(config: Any, block_tokens: int = 32, change: Callable[[Any], None] = lambda _: None) -> StageContext:
        bench = Bench(tmp_path).lay_language()
        tokenizer = AutoTokenizer.from_pretrained(bench.inputs / "teacher")
        config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            change(model)
        model.save_pretrained(bench.inputs / "student")
        tokenizer.save_pretrained(bench.inputs / "student")
        task = TASK | {"block_tokens": block_tokens}
        spec = make_spec([{"kind": "distill"}, {"kind": "export"}], task=task, student=STUDENT)
        order = Order.parse(json.loads(bench.write_order(spec, 1, "stage", labels=[]).read_text()))
        ctx = StageContext(order, Reporter(nowhere.fileno()), threading.Event(), Mailbox())
        made.append(ctx)
        return ctx

    with open("/dev/null", "wb") as nowhere:
        yield make
        for ctx in made:
            ctx.close()


def write(ctx: StageContext, folder: Path, kind: str, **settings: Any) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    return list_methods("exporters")[kind](**settings).build(ctx)(folder)


def encode(folder: Path) -> dict[str, torch.Tensor]:
    """Returns two texts of unlike lengths, filled up on the left, as they are for generation."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="<end>")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].min() == 0
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def generate(folder: Path, inputs: dict[str, torch.Tensor], *, reads_all_again: bool = False) -> Any:
    """Returns what a graph writes greedily, and the logits of each token, by nothing but onnxruntime and numpy."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    past = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    outputs = [node.name for node in session.get_outputs()]
    empty = {node.name: np.zeros((2, node.shape[1], 0, node.shape[3]), np.float32) for node in past}
    ids, mask, kept, found = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), empty, []
    unread = ids
    for _ in range(NUM_NEW):
        places = (mask.cumsum(1) - 1).clip(0)[:, -unread.shape[1] :]
        given = {"input_ids": unread, "attention_mask": mask, "position_ids": places, **kept}
        logits, *present = session.run(outputs, given)
        found.append(logits[:, -1])
        new = found[-1].argmax(-1)[:, None]
        ids, mask = np.hstack([ids, new]), np.hstack([mask, np.ones_like(new)])
        if reads_all_again:
            unread = ids
        else:
            unread = new
            names = [name.replace("present", "past_key_values") for name in outputs[1:]]
            kept = dict(zip(names, present, strict=True))
            assert present[0].shape[2] == mask.shape[1] - 1
    return ids, np.stack(found, axis=1)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_a_graph_writes_what_stock_transformers_does(
    architecture: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    ctx = context(CONFIGS[architecture]())
    measured = write(ctx, tmp_path / "form", "onnx")
    assert max(measured["max_logit_difference"], measured["cached_max_logit_difference"]) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(ctx.input("student"))
    inputs = encode(tmp_path / "form")
    expected = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NUM_NEW,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for reads_all_again in (False, True):
        ids, logits = generate(tmp_path / "form", inputs, reads_all_again=reads_all_again)
        assert ids.tolist() == expected.sequences.tolist()
        np.testing.assert_allclose(logits, torch.stack(expected.logits, 1).numpy(), rtol=0, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "form" / "model.onnx")
    shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    num_heads, width = (2, 8) if architecture not in ("gpt2", "gpt_neox") else (model.config.num_attention_heads, None)
    kept = {f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")}
    assert {node.name for node in session.get_inputs()} == {"input_ids", "attention_mask", "position_ids"} | kept
    assert {node.name for node in session.get_outputs()} == {"logits"} | {
        name.replace("past_key_values", "present") for name in kept
    }
    batch, heads, past, found = shapes["past_key_values.1.value"]
    assert (batch, heads, past) == ("batch_size", num_heads, "past_sequence_length")
    assert found == (width or 32 // num_heads)
    assert set(CONFIGS) == set(CausalLM.graph_types)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_each_form_says_nearly_the_same_and_repeats(
    architecture: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    ctx = context(CONFIGS[architecture](tie_word_embeddings=True))
    settings: dict[str, dict[str, Any]] = {"onnx": {}, "onnx_fp16": {}, "onnx_int8": {}, "onnx_int4": {"group": 16}}
    expected = AutoModelForCausalLM.from_pretrained(ctx.input("student"))
    inputs, sizes = encode(ctx.input("student")), []
    for again in ("", "-again"):
        for kind, options in settings.items():
            is_coarse = kind in ("onnx_int8", "onnx_int4")  # and the answers of random weights hang by a hair
            least = {"min_agreement": 0.6} if is_coarse else {}
            measured = write(ctx, tmp_path / f"{kind}{again}", kind, **options, **least)
            assert {"agreement", "cached_agreement"} < set(measured)
        ctx._remembered.clear()
    for kind in settings:
        assert contents(tmp_path / kind) == contents(tmp_path / f"{kind}-again")
        tensors = onnx.load(tmp_path / kind / "model.onnx").graph.initializer
        sizes.append(sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors))
        assert [math.prod(tensor.dims) for tensor in tensors].count(expected.lm_head.weight.numel()) == 1
        ids, logits = generate(tmp_path / kind, inputs)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, NUM_NEW, dtype=torch.long)], 1)
        with torch.no_grad():
            wanted = expected(
                input_ids=torch.from_numpy(ids), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
            ).logits[:, -NUM_NEW - 1 : -1]
        tolerance = {"onnx": 1e-5, "onnx_fp16": 4e-3, "onnx_int8": 0.1, "onnx_int4": 0.25}[kind]
        np.testing.assert_allclose(logits, wanted.numpy(), rtol=0, atol=tolerance * np.ptp(wanted.numpy()))
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"} <= names
        assert "labels.json" not in names
        assert json.loads((tmp_path / kind / "tokenizer.json").read_text())["truncation"] is None
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(4 * expected.num_parameters(), rel=0.02)  # the last layer is the embedding
    packed = {node.op_type for node in onnx.load(tmp_path / "onnx_int4" / "model.onnx").graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= packed
    constants = {tensor.name for tensor in onnx.load(tmp_path / "onnx_int8" / "model.onnx").graph.initializer}
    left = [
        node.name
        for node in onnx.load(tmp_path / "onnx_int8" / "model.onnx").graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants
    ]
    assert not left


def test_weights_that_one_file_cannot_hold_are_beside_it(
    context: Callable[..., StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(CONFIGS["gpt2"](tie_word_embeddings=True))
    coarse = {"min_agreement": 0.6}
    settings = {"onnx": {}, "onnx_fp16": {}, "onnx_int8": coarse, "onnx_int4": coarse | {"group": 16}}
    for limit in ("whole", "apart"):
        for kind, options in settings.items():
            write(ctx, tmp_path / f"{kind}-{limit}", kind, **options)
        ctx._remembered.clear()
        monkeypatch.setattr(exporting, "MAX_GRAPH_BYTES", 10_000)
    inputs = encode(ctx.input("student"))
    for kind in settings:
        whole, apart = (tmp_path / f"{kind}-{limit}" for limit in ("whole", "apart"))
        assert {path.name for path in apart.iterdir()} - {path.name for path in whole.iterdir()} == {"model.onnx.data"}
        assert (apart / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
        assert generate(apart, inputs)[1].tobytes() == generate(whole, inputs)[1].tobytes()
        numbers = {runtimes.count_onnx_parameters(folder / "model.onnx") for folder in (whole, apart)}
        assert len(numbers) == 1


def test_half_precision_keeps_far_places_and_loud_states(context: Callable[..., StageContext], tmp_path: Path) -> None:
    """The angle of place 300 is a number that half precision has no fraction for, and 2,000² one that it lacks."""
    ctx = context(LlamaConfig(**GROUPED), 384, lambda model: model.model.embed_tokens.weight.mul_(2000 / 0.2))
    measured = write(ctx, tmp_path, "onnx_fp16")
    assert measured["agreement"] >= 0.99
    assert measured["max_logit_difference"] < 0.05


def test_a_quantised_model_with_a_tied_table_keeps_its_codes(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    form = {"kind": "onnx_int4", "compute": "float32", "min_agreement": 1.0}
    stages = [
        {"kind": "quantize", "group": 16, "embedding_bits": 8, "method": {"kind": "rtn"}},
        {"kind": "export", "formats": [form]},
    ]
    done = bench.succeed_all(make_spec(stages, task=TASK, student=STUDENT), labels=[])
    assert done[1].last["summary"]["formats"]["onnx_int4"]["max_logit_difference"] < 1e-4


def test_a_report_has_quality_and_speed_of_each_form(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    kinds = ["safetensors", "onnx", "onnx_int8"]
    forms = [{"kind": kind} for kind in kinds]
    stages = [{"kind": "distill"}, {"kind": "export", "formats": forms}, {"kind": "evaluate", "latency_samples": 10}]
    spec = make_spec(stages, task=TASK, student=STUDENT)
    pico.write_language_model(bench.inputs / "student", num_layers=2)
    bench.adopt(bench.succeed(spec, 1, labels=[]), 1, "export")
    evaluate = bench.succeed(spec, 2, labels=[])
    rows = {row["name"]: row for row in evaluate.last["summary"]["models"]}
    assert list(rows) == ["teacher", "student", *kinds]
    assert [rows[kind]["runtime"] for kind in kinds] == ["torch", "onnxruntime", "onnxruntime"]
    student = rows["student"]
    assert rows["onnx"]["perplexity"] == pytest.approx(student["perplexity"], rel=1e-5)
    assert rows["onnx_int8"]["perplexity"] == pytest.approx(student["perplexity"], rel=0.05)
    assert rows["onnx_int8"]["perplexity"] != student["perplexity"]
    for row in rows.values():
        assert row["num_parameters"] == rows["teacher" if row["name"] == "teacher" else "student"]["num_parameters"]
        assert min(row["throughput_per_s"], row["latency_p50_ms"], row["size_bytes"]) > 0
    with pytest.raises(InvalidInput, match="language model"):
        Classifier(bench.inputs / "onnx")


def test_a_form_whose_logits_are_off_is_not_published(context: Callable[..., StageContext], tmp_path: Path) -> None:
    ctx = context(CONFIGS["gpt2"]())
    with pytest.raises(StageFailed, match="logits of onnx differ") as caught:
        write(ctx, tmp_path / "form", "onnx", tolerance=1e-12)
    assert caught.value.reason == "export_unsupported"


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (MistralConfig(**GROUPED, sliding_window=16), "a window of 16 tokens"),
        (
            LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "positions of kind 'dynamic'",
        ),
    ],
    ids=["window", "places"],
)
def test_what_a_graph_cannot_say_is_refused(
    config: Any, what: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match=what) as caught:
        write(context(config), tmp_path / "form", "onnx")
    assert (caught.value.reason, caught.value.suggestion) == ("export_unsupported", "Leave the ONNX forms out.")


def test_forms_that_an_architecture_lacks_are_refused_at_submit() -> None:
    forms = [{"kind": "safetensors"}, {"kind": "onnx"}, {"kind": "onnx_int8"}]
    stages = [{"kind": "distill"}, {"kind": "export", "formats": forms}]
    spec = load_spec(
        {"task": {"kind": "causal_lm"}, "teacher": {"model": "m"}, "student": STUDENT, "data": "d", "stages": stages}
    )
    assert spec.stages[1].check_model(spec, ModelFacts(model_type="qwen2")) == []
    problems = spec.stages[1].check_model(spec, ModelFacts(model_type="mamba"))
    assert [(problem.field, problem.message) for problem in problems] == [
        ("formats.1", "'onnx' is not written for a 'mamba'; leave it out"),
        ("formats.2", "'onnx_int8' is not written for a 'mamba'; leave it out"),
    ]
