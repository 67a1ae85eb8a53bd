"""Codes in the format of compressed-tensors: unpacked by its own library, and read by stock `transformers`."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Linear
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaConfig,
    PreTrainedModel,
)

from app.jobs.resolving import check_models
from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.methods import ModelFacts
from tests.engine_bench import FAST, LABELS, Bench, contents, make_spec
from tests.unit.test_engine_gguf import write_model
from tests.unit.test_engine_trimming import trained
from worker.engine.context import Order, StageContext
from worker.engine.loading import load_tokenizer, name_labels
from worker.engine.mailbox import Mailbox
from worker.engine.quantizing import OnGrids, Wanted, read_grids, write_grids
from worker.engine.reporting import Reporter
from worker.kernels.grids import decode, encode
from worker.methods.exporters.compressed_tensors import CompressedTensors

TASK = {"kind": "causal_lm", "block_tokens": 32}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_TYPE = {
    "albert": {"embedding_size": 32, "num_hidden_groups": 2},
    "electra": {"embedding_size": 32},
    **{kind: {"num_key_value_heads": 1} for kind in ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
}
DECODERS = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
EVEN = [[Wanted(bits, group, symmetric=True)] for bits in (4, 8) for group in (16, None)]
EVEN += [[Wanted(4, 16, symmetric=True), Wanted(8, 16, symmetric=True)]]
UNEVEN = [[one._replace(symmetric=False)] for [one] in EVEN[:4]]
CASES = [("bert", grids) for grids in (*EVEN, *UNEVEN)] + [("distilbert", UNEVEN[0]), ("llama", UNEVEN[3])]
CASES += [(kind, EVEN[place % 5]) for place, kind in enumerate(CompressedTensors.model_types) if kind != "bert"]


@contextmanager
def exporting(bench: Bench, *, is_decoder: bool) -> Iterator[StageContext]:
    """Yields the surroundings of an export, in this process."""
    student = {"kind": "teacher_layers", "keep": [0, 1]}
    stages = [{"kind": "quantize"}, {"kind": "export", "formats": [{"kind": "compressed_tensors"}]}]
    spec = make_spec(stages, student=student, **({"task": TASK} if is_decoder else {}))
    order = bench.write_order(spec, 1, "stage", labels=[] if is_decoder else LABELS)
    with open("/dev/null", "wb") as nowhere:
        reporter = Reporter(nowhere.fileno())
        ctx = StageContext(Order.parse(json.loads(order.read_text())), reporter, threading.Event(), Mailbox())
        yield ctx
        ctx.close()


def lay_student(ctx: StageContext, model_type: str, grids: list[Wanted], **config: Any) -> Path:
    """Writes a random student, whose matrices lie on these grids in turn."""
    is_decoder, folder = model_type in DECODERS, ctx.order.inputs_dir / "student"
    tokenizer = trained("bytes") if is_decoder else load_tokenizer(ctx.input("teacher"))
    auto_class = AutoModelForCausalLM if is_decoder else AutoModelForSequenceClassification
    settings = SIZES | OF_TYPE.get(model_type, {}) | config
    torch.manual_seed(0)
    labels = {} if is_decoder else {"num_labels": len(LABELS)}
    model = auto_class.from_config(CONFIG_MAPPING[model_type](**settings, **labels, vocab_size=len(tokenizer)))
    if not is_decoder:
        name_labels(model, LABELS)
    found, wanted = {}, {}
    for place, (name, matrix) in enumerate(list_matrices(model).items()):
        one = wanted[f"{name}.weight"] = grids[place % len(grids)]
        found[f"{name}.weight"] = one.grid(matrix.weight.detach())
        matrix.weight.data = one.round(matrix.weight.data)
    ctx.task.save_model(model, tokenizer, folder)
    write_grids(folder, OnGrids(wanted, found, {}))
    return folder


def list_matrices(model: PreTrainedModel) -> dict[str, Linear]:
    """Returns the matrices of the layers, which have a number in their names."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, Linear) and any(word.isdigit() for word in name.split("."))
    }


def load(folder: Path, *, is_symmetric: bool = True) -> PreTrainedModel:
    """Returns a folder's model by nothing but stock libraries, as the form's documentation says."""
    is_decoder = not (folder / "labels.json").exists()
    auto_class = AutoModelForCausalLM if is_decoder else AutoModelForSequenceClassification
    options = {} if is_symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def answer(model: PreTrainedModel, folder: Path) -> Tensor:
    ids_BT = AutoTokenizer.from_pretrained(folder)(["my parcel is late now"], return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids_BT).logits.float()


def read_schemes(folder: Path) -> dict[str, QuantizationScheme]:
    """Returns how each packed matrix is to be read, as the library understands the config."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quantization_status"]) == ("compressed-tensors", "compressed")
    parsed, model = QuantizationConfig.model_validate(config), load_file(folder / "model.safetensors")
    packed = [name.removesuffix(".weight_packed") for name in model if name.endswith(".weight_packed")]
    return {
        name: scheme
        for scheme in parsed.config_groups.values()
        for name in (packed if scheme.targets == ["Linear"] else scheme.targets)
    }


@pytest.mark.parametrize(("model_type", "grids"), CASES, ids=str)
def test_stock_libraries_read_the_very_weights(model_type: str, grids: list[Wanted], tmp_path: Path) -> None:
    is_decoder, is_symmetric = model_type in DECODERS, grids[0].symmetric
    bench, folder = Bench(tmp_path), tmp_path / "form"
    with exporting(bench.lay_language() if is_decoder else bench.lay(), is_decoder=is_decoder) as ctx:
        student = lay_student(ctx, model_type, grids)
        measured = CompressedTensors(dtype="float32").build(ctx)(folder)
    assert measured["max_logit_difference"] <= 1e-5
    whole, schemes, tensors = load(student), read_schemes(folder), load_file(folder / "model.safetensors")
    assert schemes.keys() == list_matrices(whole).keys()
    assert len({id(scheme) for scheme in schemes.values()}) == len(grids)
    for name, grid in read_grids(student).items():
        stem, weight_OI = name.removesuffix(".weight"), whole.get_parameter(name).detach()
        own = {key.rpartition(".")[2]: part for key, part in tensors.items() if key.startswith(f"{name}_")}
        codes_OI = unpack_from_int32(own["weight_packed"], grid.bits, weight_OI.shape) + 2.0 ** (grid.bits - 1)
        assert torch.equal(codes_OI, encode(weight_OI, grid))
        unpacked_OI = PackedQuantizationCompressor.decompress(own, schemes[stem])["weight"]
        assert torch.equal(unpacked_OI, decode(codes_OI, grid))
        assert ("weight_zero_point" in own) is not is_symmetric
    again = load(folder, is_symmetric=is_symmetric)
    torch.testing.assert_close(answer(again, folder), answer(whole, student), rtol=0, atol=1e-5)
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize("wanted", [Wanted(4, 16, symmetric=True), Wanted(8, None, symmetric=False)], ids=str)
def test_a_folder_takes_the_bits_of_codes_and_half_precision_for_all_else(wanted: Wanted, tmp_path: Path) -> None:
    with exporting(Bench(tmp_path).lay_language(), is_decoder=True) as ctx:
        student = lay_student(ctx, "llama", [wanted], tie_word_embeddings=True)
        form = CompressedTensors().build(ctx)
        measured = [form(tmp_path / name) for name in ("once", "twice")]
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    file = tmp_path / "once" / "model.safetensors"
    assert measured[0]["agreement"] >= 0.99
    assert 0 < measured[0]["max_logit_difference"] < 0.1
    assert measured[0]["stored_bytes"] == file.stat().st_size
    whole, grids = load(student), read_grids(student)
    sizes = {name: 2 * part.numel() for name, part in whole.named_parameters() if name not in grids}
    for name, grid in grids.items():
        sizes[f"{name}_packed"] = whole.get_parameter(name).numel() * wanted.bits // 8
        sizes[f"{name}_scale"] = 2 * grid.scale_OG.numel()
        sizes[f"{name}_shape"] = 16
        if not wanted.symmetric:
            sizes[f"{name}_zero_point"] = grid.zero_OG.numel() * wanted.bits // 8
    assert {name: part.nbytes for name, part in load_file(file).items()} == sizes
    again = load(tmp_path / "once", is_symmetric=wanted.symmetric)
    assert again.dtype == torch.float16
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_job_keeps_the_codes_that_gptq_chose(is_trained: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    write_model(bench.inputs / "teacher", LlamaConfig, is_tied=True)
    stages: list[dict[str, Any]] = [
        {"kind": "quantize", "group": 32, "embedding_bits": 8, "sensitive_share": 0.4, "symmetric": True},
        *([{"kind": "finetune", "of": "student", **FAST, "epochs": 1}] if is_trained else []),
        {"kind": "export", "formats": [{"kind": "compressed_tensors", "dtype": "float32"}]},
    ]
    student = {"kind": "teacher_layers", "keep": [0, 1]}
    done = bench.succeed_all(make_spec(stages, task=TASK, student=student), labels=[])
    assert done[-1].last["summary"]["formats"]["compressed_tensors"]["max_logit_difference"] <= 1e-5
    student_folder, folder = done[-2].outputs / "student", done[-1].outputs / "compressed_tensors"
    whole, grids, tensors = load(student_folder), read_grids(student_folder), load_file(folder / "model.safetensors")
    table = "model.embed_tokens.weight"
    assert torch.equal(tensors[table], whole.get_parameter(table))  # which has a grid, and stays as it is
    schemes = read_schemes(folder)
    assert {f"{name}.weight" for name in schemes} == grids.keys() - {table}
    assert {scheme.weights.num_bits for scheme in schemes.values()} == {4, 8}
    for name in schemes:
        grid, weight_OI = grids[f"{name}.weight"], whole.get_submodule(name).weight.detach()
        codes_OI = unpack_from_int32(tensors[f"{name}.weight_packed"], grid.bits, weight_OI.shape)
        assert torch.equal(codes_OI + 2.0 ** (grid.bits - 1), encode(weight_OI, grid))


@pytest.mark.parametrize(
    ("stages", "hint"),
    [
        ([{"kind": "distill"}], "no stage makes any; put a 'quantize'"),
        ([{"kind": "quantize", "bits": 3, "symmetric": True}], "those of 'quantize' have 3"),
        ([{"kind": "quantize", "sensitive_share": 0.2}], "set `symmetric` of 'quantize' to true"),
    ],
    ids=str,
)
def test_what_makes_no_codes_for_it_is_refused_at_submit(stages: list[dict[str, Any]], hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec([*stages, {"kind": "export", "formats": [{"kind": "safetensors"}, {"kind": "compressed_tensors"}]}])
    [detail] = caught.value.details
    assert detail["field"] == "stages.1.formats.1"
    assert hint in detail["message"]


@pytest.mark.parametrize(
    ("bits", "is_rounded", "hint"),
    [
        ([4], False, None),
        ([4, 8], False, None),
        ([], True, None),
        ([], False, "no stage makes any"),
        ([3, 8], False, "those of the student's model have 3"),
    ],
)
def test_codes_of_another_jobs_student_are_known_at_submit(bits: list[int], is_rounded: bool, hint: str | None) -> None:
    stages = [{"kind": "finetune", "of": "student"}, *[{"kind": "quantize"}] * is_rounded]
    stages += [{"kind": "export", "formats": [{"kind": "safetensors"}, {"kind": "compressed_tensors"}]}]
    spec = load_spec(make_spec(stages, student={"kind": "pretrained", "model": "quantised"}))
    facts = {"teacher": ModelFacts(model_type="bert"), "base": ModelFacts(model_type="bert", grid_bits=bits)}
    found = check_models(spec, facts)
    assert [problem["field"] for problem in found] == ([f"stages.{len(stages) - 1}.formats.1"] if hint else [])
    assert all(hint in problem["message"] for problem in found if hint)


def test_a_job_packs_the_codes_of_another_jobs_student(tmp_path: Path) -> None:
    bench, student = Bench(tmp_path).lay_language(), {"kind": "pretrained", "model": "quantised"}
    write_model(bench.inputs / "teacher", LlamaConfig, is_tied=True)
    rounded = make_spec([{"kind": "quantize", "group": 32}], task=TASK, student={"kind": "teacher_layers", "keep": [0]})
    bench.succeed(rounded, 0, "rounded", labels=[]).outputs.joinpath("student").rename(bench.inputs / "base")
    form = {"kind": "compressed_tensors", "dtype": "float32"}
    stages = [{"kind": "finetune", "of": "student", **FAST, "epochs": 1}, {"kind": "export", "formats": [form]}]
    done = bench.succeed_all(make_spec(stages, task=TASK, student=student), labels=[])
    assert done[-1].last["summary"]["formats"]["compressed_tensors"]["max_logit_difference"] <= 1e-5
    schemes = read_schemes(done[-1].outputs / "compressed_tensors")
    assert {f"{name}.weight" for name in schemes} == read_grids(bench.inputs / "base").keys()


def test_matrices_of_a_gpt2_are_refused_at_submit() -> None:
    stages = [{"kind": "quantize"}, {"kind": "export", "formats": [{"kind": "compressed_tensors"}]}]
    student = {"kind": "teacher_layers", "keep": [0]}
    spec = load_spec({"task": TASK, "teacher": {"model": "m"}, "student": student, "data": "d", "stages": stages})
    [problem] = spec.stages[1].check_model(spec, ModelFacts(model_type="gpt2"))
    assert problem.field == "formats.0"
    assert "is not written for a 'gpt2'" in problem.message
    assert not spec.stages[1].check_model(spec, ModelFacts(model_type="llama"))
