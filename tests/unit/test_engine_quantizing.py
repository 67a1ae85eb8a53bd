"""Weights on grids of few values, and the form that packs their codes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, GPT2Config
from transformers import AutoModelForSequenceClassification as Classifier

from app.jobs.resolving import check_models
from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.checking import check_model
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from tests import pico
from tests.engine_bench import FAST, LABELS, Bench, contents, make_spec
from tests.unit.test_engine_models import CONFIGS, make
from tests.unit.test_engine_sparsity import SPEC, TASK, matrices
from worker.engine.blocks import Blocks, read_stream
from worker.engine.loading import is_head, load_language_model, load_tokenizer
from worker.engine.matrices import find_matrices
from worker.engine.optimization import make_optimizer
from worker.engine.quantizing import OnGrids, Wanted, find_tables, put_on_grids, read_grids, read_wanted, settle
from worker.engine.runtimes import count_onnx_parameters, open_session, run_session
from worker.engine.sensitivity import choose_sensitive
from worker.kernels.grids import decode, encode
from worker.methods.stages.finetune import Finetune

STUDENT = {"kind": "teacher_layers", "keep": [0, 1, 2]}
RTN, GPTQ = {"kind": "rtn"}, {"kind": "gptq"}
EXACT = {"kind": "onnx_int4", "embedding_bits": None, "compute": "float32", "min_agreement": 1}


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One with a language model that has learned."""
    bench = Bench(tmp_path_factory.mktemp("walks")).lay_language()
    bench.succeed_all(make_spec([{"kind": "finetune", **FAST}], task=TASK, student=STUDENT), labels=[])
    return bench


def quantize_language(walks: Bench, root: Path, **settings: Any) -> tuple[Path, Path, dict[str, Any]]:
    """Returns the folders of a language model before and after, and the stage's summary."""
    bench = walks.copy(root / "work")
    spec = make_spec([{"kind": "quantize", "group": 16, **settings}], task=TASK, student=STUDENT)
    done = bench.succeed(spec, labels=[], name="later")
    return bench.inputs / "teacher", done.outputs / "student", done.last["summary"]


@pytest.mark.parametrize(
    ("bits", "settings"),
    [
        (2, {"method": RTN}),
        (3, {"method": GPTQ}),
        (4, {"method": GPTQ | {"order": "given"}, "symmetric": True, "group": None}),
        (8, {"method": RTN, "symmetric": True}),
    ],
    ids=str,
)
def test_each_weight_of_a_layer_is_one_of_few_values(
    walks: Bench, bits: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    before, after, summary = quantize_language(walks, tmp_path, **settings, bits=bits)
    grids = read_grids(after)
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (before, after))
    found = matrices(new)
    assert {f"{name}.weight" for name in found} == set(grids)
    for name, weight_OI in found.items():
        grid = grids[f"{name}.weight"]
        torch.testing.assert_close(decode(encode(weight_OI, grid), grid), weight_OI)
        groups = weight_OI.reshape(-1, weight_OI.shape[1] // grid.scale_OG.shape[1])
        assert max(len(group.unique()) for group in groups) <= 2**bits
        assert not torch.equal(weight_OI, matrices(old)[name])
    kept = {name for name, _ in old.named_parameters()} - set(grids)
    assert all(torch.equal(old.get_parameter(name), new.get_parameter(name)) for name in kept)
    sizes = {name: parameter.numel() for name, parameter in new.named_parameters()}
    codes = sum(sizes[name] * bits / 8 + 5 * grid.scale_OG.numel() for name, grid in grids.items())
    assert summary["packed_bytes"] == codes + 4 * sum(sizes[name] for name in kept)
    assert summary["packed_bytes"] < summary["stored_bytes"]
    products = sum(weight_OI.numel() for weight_OI in found.values()) + new.get_input_embeddings().weight.numel()
    ids, is_learned = read_stream(walks.inputs / "data" / "validation.jsonl", {"text": "text"}, load_tokenizer(after))
    split, width = Blocks(ids, is_learned, TASK["block_tokens"]).head(1024), new.config.hidden_size
    lengths = [
        min(split.max_length, split.num_places - start) for start in range(0, split.num_places, split.max_length)
    ]
    flops = [2 * tokens * products + new.config.num_hidden_layers * 4 * tokens**2 * width for tokens in lengths]
    assert summary["flops"] == summary["flops_before"] == pytest.approx(np.mean(flops), rel=0.01)


def test_fewer_bits_cost_more_and_gptq_less_than_the_nearest(walks: Bench, tmp_path: Path) -> None:
    lost = {}
    for bits, method in ((2, RTN), (2, GPTQ), (4, RTN), (8, GPTQ)):
        _, _, summary = quantize_language(walks, tmp_path / f"{bits}{method['kind']}", bits=bits, method=method)
        before, after = (summary[name]["loss"] for name in ("validation_before", "validation"))
        lost[bits, method["kind"]] = after - before
    assert lost[2, "rtn"] > lost[2, "gptq"] > lost[8, "gptq"]
    assert lost[2, "rtn"] > lost[4, "rtn"]
    assert abs(lost[8, "gptq"]) < 0.01


def test_awq_moves_scales_into_norms_and_ends_with_the_same_bytes_again(walks: Bench, tmp_path: Path) -> None:
    settings = {"bits": 3, "method": {"kind": "awq"}}
    before, after, _ = quantize_language(walks, tmp_path / "once", **settings)
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (before, after))
    grids = read_grids(after)
    moved = {
        name.partition(".h.")[2].partition(".")[2]
        for name, parameter in new.named_parameters()
        if name not in grids and not torch.equal(parameter, old.get_parameter(name))
    }
    norms = {f"{name}.{part}" for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    assert {"ln_1.weight", "ln_2.weight"} <= moved <= norms | {"attn.c_attn.bias"}
    for name, grid in grids.items():
        weight_OI = new.get_parameter(name).detach().T
        torch.testing.assert_close(decode(encode(weight_OI, grid), grid), weight_OI)
    assert contents(quantize_language(walks, tmp_path / "again", **settings)[1]) == contents(after)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_every_model_has_its_matrices_found(config: Any) -> None:
    model = make(config)
    found = {matrix.name: matrix.weight_OI for layer in find_matrices(model) for matrix in layer}
    assert {name.removesuffix(".weight") for name in found} == set(matrices(model))
    assert all(
        torch.equal(weight_OI, matrices(model)[name.removesuffix(".weight")]) for name, weight_OI in found.items()
    )


def begin(model: Any, wanted: dict[str, Wanted]) -> OnGrids:
    """Returns grids fitted to some tensors of a model."""
    rows = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows |= {matrix.name: matrix.weight_OI for layer in find_matrices(model) for matrix in layer}
    return OnGrids(wanted, {name: one.grid(rows[name]) for name, one in wanted.items()}, {})


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=lambda config: config.model_type)
@pytest.mark.parametrize("wanted", [Wanted(4, 16, symmetric=False), Wanted(8, None, symmetric=True)], ids=str)
def test_in_training_a_model_is_the_rounded_one(config: Any, wanted: Wanted) -> None:
    """Values are those that stay; the derivative by a weight is that by its rounded one."""
    model, ids = make(config).eval(), torch.arange(3, 23).reshape(2, 10)
    put_on_grids(model, begin(model, {matrix.name: wanted for layer in find_matrices(model) for matrix in layer}))
    model(input_ids=ids).logits.square().sum().backward()
    trained = model(input_ids=ids).logits.detach()
    slopes = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "original" in name}
    grids = settle(model)
    assert {f"{name}.weight" for name in matrices(model)} == set(grids)
    model.zero_grad()
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, trained)
    logits.square().sum().backward()
    for name, slope in slopes.items():
        found = model.get_parameter(name.replace("parametrizations.weight.original", "weight")).grad
        torch.testing.assert_close(found, slope)
    for name, weight_OI in matrices(model).items():
        grid = grids[f"{name}.weight"]
        torch.testing.assert_close(decode(encode(weight_OI, grid), grid), weight_OI)


@pytest.mark.parametrize("method", [GPTQ, {"kind": "awq"}], ids=lambda method: method["kind"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_training_starts_with_what_rounding_made(
    walks: Bench, bits: int, symmetric: bool, method: dict[str, Any], tmp_path: Path
) -> None:
    """The model says the same, and training at a rate of nearly nothing ends with the same codes."""
    bench = walks.copy(tmp_path)
    settings = {"bits": bits, "group": 16, "symmetric": symmetric, "embedding_bits": 4, "method": method}
    rest = {"kind": "finetune", "of": "student", "epochs": 1, "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    stages = [{"kind": "quantize", **settings}, {**rest, "weight_decay": 0.0, "dropout": 0.0}]
    done = bench.succeed_all(make_spec(stages, task=TASK, student=STUDENT), labels=[])
    rounded, trained = (one.outputs / "student" for one in done)
    found, wanted = (load_file(folder / "grids.safetensors") for folder in (trained, rounded))
    assert found.keys() == wanted.keys()
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (rounded, trained))
    for name in read_grids(rounded):
        old, new = (model.get_parameter(name).detach() for model in (before, after))
        is_used_OG = (old.T if ".h." in name else old).unflatten(1, (-1, 16)).any(-1)  # a scale of zeros tells nothing
        for part in ("scale", "zero"):
            assert torch.equal(found[f"{name}.{part}"][is_used_OG], wanted[f"{name}.{part}"][is_used_OG])
        values = (old / new)[old != 0]
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-5, atol=0)
        assert torch.equal(old == 0, new == 0)
    put_on_grids(before, OnGrids(read_wanted(rounded), read_grids(rounded), {}))
    ids = torch.arange(3, 23).reshape(2, 10)
    whole = AutoModelForCausalLM.from_pretrained(rounded).eval()
    assert torch.equal(before.eval()(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_a_model_that_hears_what_it_was_before_regains_what_rounding_cost() -> None:
    model, ids = make(CONFIGS[0]).eval(), torch.randint(3, 60, (32, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight_OI in matrices(model).values():
            weight_OI *= 5  # else little of the answers hangs on the layers
        wanted = model(input_ids=ids).logits
    wanted_of = dict.fromkeys((f"{name}.weight" for name in matrices(model)), Wanted(3, 16, symmetric=False))
    put_on_grids(model, begin(model, wanted_of))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(50):
        loss = (model(input_ids=ids).logits - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    settle(model)
    assert (model(input_ids=ids).logits - wanted).square().mean().item() < 0.5 * losses[0]


def fake(weight: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """Rounds to the nearest on a grid of each group, by torch."""
    rows_RN = weight.reshape(-1, group)
    low_R, high_R = rows_RN.amin(1).clamp(max=0), rows_RN.amax(1).clamp(min=0)
    scale_R = ((high_R - low_R) / (2**bits - 1)).half().float()
    scale_R[scale_R == 0] = 1
    zero_R = (-low_R / scale_R).round().int()
    return torch.fake_quantize_per_channel_affine(rows_RN, scale_R, zero_R, 0, 0, 2**bits - 1).reshape(weight.shape)


def test_embeddings_get_bits_of_their_own_and_stay_tied(walks: Bench, tmp_path: Path) -> None:
    before, after, summary = quantize_language(walks, tmp_path, bits=3, embedding_bits=8, method=RTN)
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (before, after))
    assert new.lm_head.weight is new.transformer.wte.weight
    assert [*find_tables(new, 16)] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert not find_tables(new, 64)  # which their width of 32 is no multiple of
    for name in find_tables(new, 16):
        table = old.get_parameter(name).detach()
        torch.testing.assert_close(new.get_parameter(name), fake(table, 16, 8), rtol=1e-5, atol=1e-6)
        assert not torch.equal(new.get_parameter(name), table)
        assert summary["bits"][name] == 8
    grids, sizes = read_grids(after), {name: parameter.numel() for name, parameter in new.named_parameters()}
    assert set(grids) == {name for name, parameter in new.named_parameters() if parameter.ndim == 2}
    codes = sum(sizes[name] * grid.bits / 8 + 5 * sizes[name] / 16 for name, grid in grids.items())
    assert summary["packed_bytes"] == codes + 4 * sum(sizes[name] for name in set(sizes) - set(grids))


def test_a_tied_table_is_trained_on_its_grid_in_both_places(walks: Bench, tmp_path: Path) -> None:
    work = walks.copy(tmp_path)
    stages = [
        {"kind": "quantize", "bits": 3, "group": 16, "embedding_bits": 4, "sensitive_share": 0.4},
        {"kind": "finetune", "of": "student", **FAST, "epochs": 1},
    ]
    done = work.succeed_all(make_spec(stages, task=TASK, student=STUDENT), labels=[])
    rounded, trained = (AutoModelForCausalLM.from_pretrained(one.outputs / "student") for one in done)
    grids = read_grids(done[1].outputs / "student")
    assert {name: grid.bits for name, grid in grids.items()} == done[0].last["summary"]["bits"]
    assert trained.lm_head.weight is trained.transformer.wte.weight
    assert not torch.equal(trained.lm_head.weight, rounded.lm_head.weight)
    for name, grid in grids.items():
        weight = trained.get_parameter(name).detach()
        weight_OI = weight.T if ".h." in name else weight
        torch.testing.assert_close(decode(encode(weight_OI, grid), grid), weight_OI)
        assert max(len(group.unique()) for group in weight_OI.reshape(-1, 16)) <= 2**grid.bits
    seen = [one.last["summary"]["validation"]["loss"] for one in done]
    assert seen[1] < seen[0]


def test_in_training_a_tied_table_has_the_derivative_of_both_its_uses() -> None:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(3, 23).reshape(2, 10)
    rounded, on_grids = copy.deepcopy(model), begin(model, {"transformer.wte.weight": Wanted(4, 16, symmetric=False)})
    with torch.no_grad():
        rounded.lm_head.weight.copy_(fake(rounded.lm_head.weight, 16, 4))
        model.lm_head.weight.copy_(0.99 * rounded.lm_head.weight)  # between the values, and not beyond the ends
    put_on_grids(model, on_grids)
    logits, wanted = (one(input_ids=ids).logits for one in (model, rounded))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    wanted.square().sum().backward()
    [slope] = [one.grad for name, one in model.named_parameters() if "wte" in name]
    torch.testing.assert_close(slope, rounded.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    assert set(settle(model)) == {"transformer.wte.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One with a student that has learned the classes."""
    bench = Bench(tmp_path_factory.mktemp("taught")).lay()
    stages = [{"kind": "finetune", **FAST}, {"kind": "distill", **FAST}]
    bench.succeed_all(make_spec(stages))
    return bench


def spoil(weight_OI: torch.Tensor) -> torch.Tensor:
    """Returns a matrix with one huge weight a row, beside which 15 steps cannot tell the others apart."""
    spoiled_OI = weight_OI.clone()
    spoiled_OI[:, 0] = 30 * weight_OI.abs().amax()
    return spoiled_OI


def go_on(bench: Bench, root: Path, *stages: dict[str, Any]) -> Path:
    """Runs stages after the student has learned, in a copy; returns the folder of what there is then, by role."""
    work, spec = bench.copy(root / "work"), make_spec([{"kind": "distill"}, *stages])
    for ordinal, stage in enumerate(stages, 1):
        work.adopt(work.succeed(spec, ordinal, f"later-{ordinal}"), ordinal, stage["kind"])
    return work.inputs


def read(folder: Path, text: str) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Returns a text's tokens, and what an ONNX form says of it."""
    inputs = dict(AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt"))
    return inputs, run_session(open_session(folder, 1), inputs)


def measure_alone(model: Any, say: Callable[[], torch.Tensor], *, is_regression: bool = False) -> dict[str, float]:
    """Returns what rounding each matrix alone to 3 bits changes of what the model says, of all rows at once."""
    with torch.no_grad():
        before_NC, found = say().double(), {}
        for name, weight_OI in matrices(model).items():
            whole_OI = weight_OI.clone()
            weight_OI.copy_(fake(whole_OI, 16, 3))
            after_NC = say().double()
            weight_OI.copy_(whole_OI)
            kl = kl_div(after_NC.log_softmax(-1), before_NC.softmax(-1), reduction="batchmean").item()
            found[f"{name}.weight"] = (after_NC - before_NC).square().mean().item() if is_regression else kl
    return found


def test_harm_to_a_language_model_is_of_every_token(walks: Bench, tmp_path: Path) -> None:
    before, _, summary = quantize_language(walks, tmp_path, bits=3, sensitive_share=0.5, method=RTN)
    model, tokenizer = load_language_model(before).eval(), load_tokenizer(before)
    data = tmp_path / "work" / "in" / "data" / "train.jsonl"
    ids, learned = read_stream(data, {"text": "text"}, tokenizer, is_chat=False)
    batches = [*Blocks(ids, learned, 32).head(1024).in_order(torch.device("cpu"))]
    wanted = measure_alone(model, lambda: torch.cat([model(**one.inputs).logits[one.is_row] for one in batches]))
    assert summary["harm"] == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("task", [{}, {"task": {"kind": "text_regression", "value": "length"}}], ids=["kl", "values"])
def test_the_most_sensitive_matrices_get_more_bits(bench: Bench, task: dict[str, Any], tmp_path: Path) -> None:
    work, share = bench.copy(tmp_path / "work"), 0.3
    if task:
        for path in (work.inputs / "data").iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row | {"length": len(row["text"]) / 10}) + "\n" for row in rows))
    labels = {"labels": ["length"]} if task else {}
    stage = {"kind": "quantize", "group": 16, "bits": 3, "sensitive_share": share, "method": RTN}
    done = work.succeed(make_spec([{"kind": "distill"}, stage], **task), 1, "later", **labels)
    summary, grids = done.last["summary"], read_grids(done.outputs / "student")
    texts = [json.loads(line)["text"] for line in (work.inputs / "data" / "train.jsonl").read_text().splitlines()]
    model, before = (
        Classifier.from_pretrained(done.outputs / "student").eval(),
        load_file(work.inputs / "student" / "model.safetensors"),
    )
    for name, weight_OI in matrices(model).items():
        weight_OI.data.copy_(before[f"{name}.weight"])
    inputs = AutoTokenizer.from_pretrained(work.inputs / "student")(texts, padding=True, return_tensors="pt")
    wanted = measure_alone(model, lambda: model(**inputs).logits, is_regression=bool(task))
    assert summary["harm"] == pytest.approx(wanted, rel=0.02)
    sizes = {f"{name}.weight": weight_OI.numel() for name, weight_OI in matrices(model).items()}
    fine = {name for name, bits in summary["bits"].items() if bits == 8}
    assert {name: grid.bits for name, grid in grids.items()} == summary["bits"]
    assert {summary["bits"][name] for name in set(sizes) - fine} == {3}
    left = share * sum(sizes.values()) - sum(sizes[name] for name in fine)
    assert fine
    assert left >= 0
    least = min(wanted[name] / sizes[name] for name in fine)
    assert all(sizes[name] > left or wanted[name] / sizes[name] <= least for name in set(sizes) - fine)


def test_a_matrix_that_is_too_large_is_passed_over() -> None:
    harm, sizes = {"a": 1.0, "b": 8.0, "c": 0.9, "d": 3.0}, {"a": 1, "b": 4, "c": 1, "d": 4}
    assert choose_sensitive(harm, sizes, 0.8) == ["b", "a", "c"]
    assert choose_sensitive(harm, sizes, 0.2) == ["a", "c"]
    assert choose_sensitive(harm, sizes, 0.05) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3, "group": None},
        {"bits": 4, "embedding_bits": 4, "method": {"kind": "awq"}},
        {"bits": 4, "embedding_bits": 8, "sensitive_share": 0.4},
        {"bits": 8, "symmetric": True, "method": RTN},
    ],
    ids=str,
)
def test_a_quantised_student_is_packed_without_loss(bench: Bench, settings: dict[str, Any], tmp_path: Path) -> None:
    stages = [{"kind": "quantize", "group": 16} | settings, {"kind": "export", "formats": [EXACT]}]
    inputs = go_on(bench, tmp_path, *stages)
    folder, student = inputs / "onnx_int4", Classifier.from_pretrained(inputs / "student")
    for text in ("a b c", "one two three four"):
        tokens, logits = read(folder, text)
        with torch.no_grad():
            np.testing.assert_allclose(logits, student(**tokens).logits.numpy(), atol=1e-4)
    graph = onnx.load(folder / "model.onnx").graph
    grids = read_grids(inputs / "student")
    tables = [name for name, part in student.named_modules() if isinstance(part, torch.nn.Embedding)]
    for kind, names in (("MatMulNBits", [*matrices(student)]), ("GatherBlockQuantized", tables)):
        bits = [one.i for node in graph.node if node.op_type == kind for one in node.attribute if one.name == "bits"]
        known = [grids[f"{name}.weight"] for name in names if f"{name}.weight" in grids]
        assert sorted(bits) == sorted(8 if grid.bits == 8 else 4 for grid in known)
    assert len(grids) == len(matrices(student)) + len(tables) * ("embedding_bits" in settings)
    assert count_onnx_parameters(folder / "model.onnx") == pytest.approx(student.num_parameters(), rel=0.03)


def test_forms_of_fewer_bits_need_no_stage_before(bench: Bench, tmp_path: Path) -> None:
    forms = [
        {"kind": "onnx"},
        {"kind": "onnx_fp16"},
        {"kind": "onnx_int4", "group": 16, "embedding_bits": 4, "min_agreement": 0.5},
    ]
    inputs = go_on(bench, tmp_path, {"kind": "export", "formats": forms}, {"kind": "evaluate"})
    sizes = {kind: (inputs / kind / "model.onnx").stat().st_size for kind in ("onnx", "onnx_fp16", "onnx_int4")}
    assert sizes["onnx_int4"] < 0.65 * sizes["onnx"]
    assert sizes["onnx_fp16"] < sizes["onnx"]
    halves = onnx.load(inputs / "onnx_fp16" / "model.onnx").graph.initializer
    assert {tensor.data_type for tensor in halves if len(tensor.dims) > 1} == {onnx.TensorProto.FLOAT16}
    graph = onnx.load(inputs / "onnx_int4" / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert "GatherBlockQuantized" in kinds
    assert "MatMulNBits" in kinds
    report = (inputs / "report" / "report.json").read_text()
    assert '"onnx_int4"' in report
    assert '"onnx_fp16"' in report
    tokens, logits = read(inputs / "onnx_fp16", "a b c")
    with torch.no_grad():
        wanted = Classifier.from_pretrained(inputs / "student")(**tokens).logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=0.05)
    assert not np.allclose(logits, wanted, atol=1e-6)


@pytest.mark.parametrize("num_neurons", [48, 24])
@pytest.mark.parametrize("embedding_bits", [8, None])
def test_matrices_that_no_block_fits_are_told_of(num_neurons: int, embedding_bits: int | None, tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    folder = pico.write_model(bench.inputs / "student", 2, width=20)
    BertModel(BertConfig.from_pretrained(folder, intermediate_size=num_neurons)).save_pretrained(folder)
    form = {"kind": "onnx_int4", "embedding_bits": embedding_bits, "min_agreement": 0.1}
    finished = bench.run(make_spec([{"kind": "distill"}, {"kind": "export", "formats": [form]}]), 1)
    total = 2 * 6 + 3 * (embedding_bits is not None)
    if num_neurons % 16:
        assert (finished.last["type"], finished.last["reason"]) == ("error", "export_unsupported")
        assert f"None of the {total} matrices" in finished.last["message"]
        return
    [event] = [report["event"] for report in finished.of("event")]
    assert (event["type"], event["level"]) == ("matrices_unpacked", "warning")
    assert event["data"] == {"num_left": total - 2, "num_matrices": total}
    graph = onnx.load(finished.outputs / "onnx_int4" / "model.onnx").graph
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 2  # the rows of what reads the neurons


def test_a_form_that_disagrees_is_not_published(bench: Bench, tmp_path: Path) -> None:
    work = bench.copy(tmp_path / "work")
    rough = {"kind": "onnx_int4", "group": 32, "min_agreement": 1, "embedding_bits": 4}
    for path in (work.inputs / "student").glob("model.safetensors"):
        weights = {name: spoil(tensor) if tensor.dim() == 2 else tensor for name, tensor in load_file(path).items()}
        path.chmod(0o644)
        save_file(weights, path, metadata={"format": "pt"})
    finished = work.run(make_spec([{"kind": "distill"}, {"kind": "export", "formats": [rough]}]), 1, "later")
    assert finished.last["type"] == "error"
    assert finished.last["reason"] == "goal_missed"


def test_training_goes_on_with_weights_on_grids(bench: Bench, tmp_path: Path) -> None:
    """And ends with the same bytes after a kill and a stop, and is packed without loss."""
    work = bench.copy(tmp_path / "work")
    stages = [
        {"kind": "quantize", "group": 16, "bits": 2, "embedding_bits": 4, "sensitive_share": 0.3},
        {"kind": "distill", **FAST},
    ]
    spec = make_spec([{"kind": "distill"}, *stages, {"kind": "export", "formats": [EXACT]}])
    work.adopt(work.succeed(spec, 1, "rounded"), 1, "quantize")
    again = work.copy(tmp_path / "again")
    trained = work.succeed(spec, 2, "trained")
    checkpoint = None
    for how in ("kill", "stop"):
        order = again.write_order(spec, 2, how, checkpoint=checkpoint and str(checkpoint), checkpoint_s=0)
        found, _ = again.interrupt(order, 2, how)
        checkpoint = found[-1]
    resumed = again.succeed(spec, 2, "last", checkpoint=str(checkpoint))
    assert contents(resumed.outputs) == contents(trained.outputs)
    grids, model = (read(trained.outputs / "student") for read in (read_grids, Classifier.from_pretrained))
    assert {grid.bits for grid in grids.values()} == {2, 4, 8}
    for name, grid in grids.items():
        weight_OI = model.get_parameter(name).detach()
        assert max(len(group.unique()) for group in weight_OI.reshape(-1, 16)) <= 2**grid.bits
        torch.testing.assert_close(decode(encode(weight_OI, grid), grid), weight_OI)
    work.adopt(trained, 2, "distill")
    assert work.succeed(spec, 3, "exported").last["summary"]["formats"]["onnx_int4"]["max_logit_difference"] < 1e-4


def test_a_quantised_or_sparse_student_of_another_job_stays_what_it_is(bench: Bench, tmp_path: Path) -> None:
    """Trained as a whole; what would change all of its weights is refused, at submit where it is known what it is."""
    stages = [
        {"kind": "sparsify", "share": 0.2, "method": {"kind": "magnitude"}},
        {"kind": "quantize", "bits": 2, "group": 16, "method": RTN},
    ]
    base = {"kind": "pretrained", "model": "quantised"}
    learn = {"kind": "finetune", "of": "student", **FAST, "epochs": 1}
    for number, stage in enumerate(stages):
        work = bench.copy(tmp_path / stage["kind"])
        (go_on(bench, tmp_path / str(number), *stages[: number + 1]) / "student").rename(work.inputs / "base")
        (work.inputs / "student").rename(tmp_path / f"other-{number}")
        trained = work.succeed(make_spec([learn], student=base), 0, "trained").outputs / "student"
        old, new = (load_file(folder / "model.safetensors") for folder in (work.inputs / "base", trained))
        grids, begun = read_grids(trained), read_grids(work.inputs / "base")
        assert (grids.keys(), bool(grids)) == (begun.keys(), bool(number))
        assert any(not torch.equal(new[name], old[name]) for name in new)
        for name, grid in grids.items():
            torch.testing.assert_close(decode(encode(new[name], grid), grid), new[name])
        adapted = make_spec([learn | {"adapter": {"kind": "lora"}}], student=base)
        last = work.run(adapted, 0, "adapted").last
        assert (last["type"], last["reason"], "'adapter'" in last["message"]) == ("error", "spec_invalid", True)
        facts = check_model({path.name: path for path in (work.inputs / "base").iterdir()})
        spec = load_spec(adapted)
        [problem] = spec.stages[0].check_model(spec, facts)
        assert (problem.field, "neither quantised nor sparsified" in problem.message) == ("adapter", True)
        assert spec.stages[0].check_model(spec, facts.model_copy(update={"has_fixed_weights": False})) == []


BASE, SECOND = {"kind": "pretrained", "model": "quantised"}, {"kind": "finetune", "of": "student"}
ON_GRIDS = ModelFacts(model_type="bert", num_layers=3, grid_bits=[4, 8], has_fixed_weights=True)
PARTS = {"kind": "multi_task", "tasks": {"a": {"label": "a"}, "b": {"label": "b"}}, "shared": 1}


def problems_of(start: ModelFacts, *stages: dict[str, Any], **changes: Any) -> list[tuple[str, str]]:
    """Returns what is found at submit of stages that make a student of a model with these facts."""
    spec = load_spec(SPEC | {"student": BASE, "stages": list(stages)} | changes)
    found = check_models(spec, {"teacher": ModelFacts(model_type="bert", num_layers=3), "base": start})
    return [(problem["field"], problem["message"]) for problem in found]


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "quantize"},
        {"kind": "prune", "num_layers": 2},
        {"kind": "prune", "to": {"parameters": 0.5}},
        {"kind": "sparsify"},
        {"kind": "trim_vocabulary"},
        {"kind": "intermediate", "of": "student", "data": "reviews"},
    ],
    ids=str,
)
def test_a_quantised_student_of_another_job_is_not_taken_off_its_grids(stage: dict[str, Any]) -> None:
    for before in ([], [SECOND]):
        [(field, message)] = problems_of(ON_GRIDS, *before, stage, SECOND)
        assert field == f"stages.{len(before)}.kind"
        assert f"'{stage['kind']}' takes weights off their grids; name the model as it was before" in message
    sparse = ON_GRIDS.model_copy(update={"grid_bits": []})
    assert problems_of(sparse, stage, SECOND) == []
    assert problems_of(ON_GRIDS, SECOND, {"kind": "distill"}, {"kind": "finetune"}) == []


@pytest.mark.parametrize(
    "kept", [{"keep": [0, 2]}, {"keep": [0, 1, 2]}, {"keep": [0], "intermediate_size": 16}], ids=str
)
def test_layers_are_not_taken_out_of_a_quantised_model(kept: dict[str, Any]) -> None:
    student = {"kind": "teacher_layers", "model": "quantised"} | kept
    [(field, message)] = problems_of(ON_GRIDS, SECOND, student=student)
    assert (field, "name it as it was before 'quantize'" in message) == ("student.model", True)
    assert problems_of(ON_GRIDS.model_copy(update={"grid_bits": []}), SECOND, student=student) == []
    spec = load_spec(SPEC | {"student": kept | {"kind": "teacher_layers"}, "stages": [{"kind": "distill"}]})
    assert check_models(spec, {"teacher": ON_GRIDS}) == []  # whose student begins on no grids


def test_what_would_change_all_weights_on_grids_is_refused_wherever_it_stands() -> None:
    adapted = {"kind": "distill", "adapter": {"kind": "lora"}}
    assert [field for field, _ in problems_of(ON_GRIDS, SECOND, adapted)] == ["stages.1.adapter"]
    data = {"a": "tickets", "b": "tickets"}
    [(field, message)] = problems_of(ON_GRIDS, {"kind": "distill"}, task=PARTS, data=data)
    assert (field, "'distill' takes weights off their grids" in message) == ("stages.0.kind", True)
    assert problems_of(ON_GRIDS, {"kind": "distill"}, task=PARTS | {"shared": "all"}, data=data) == []


def test_a_table_of_which_the_data_use_few_rows_ends_on_its_grid(bench: Bench, tmp_path: Path) -> None:
    work = bench.copy(tmp_path / "work")
    for path in (work.inputs / "data").iterdir():
        rows = [{"text": label[:5], "label": label} for label in LABELS for _ in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"kind": "quantize", "group": 16, "embedding_bits": 4}, {"kind": "finetune", "of": "student"}]
    spec = make_spec([{"kind": "distill"}, *stages])
    rounded = work.succeed(spec, 1, "rounded")
    work.adopt(rounded, 1, "quantize")
    trained = work.succeed(spec, 2, "trained").outputs / "student"
    name = "bert.embeddings.word_embeddings.weight"
    grid, table_VI = read_grids(trained)[name], Classifier.from_pretrained(trained).get_parameter(name).detach()
    torch.testing.assert_close(decode(encode(table_VI, grid), grid), table_VI)
    assert not torch.equal(table_VI, Classifier.from_pretrained(rounded.outputs / "student").get_parameter(name))


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=lambda config: config.model_type)
def test_weights_on_grids_learn_at_the_rates_that_they_had(config: Any) -> None:
    settings = Finetune(layer_decay=0.5, learning_rate=0.1, head_learning_rate=0.3)

    def find_rates(model: Any) -> list[tuple[tuple[int, ...], float, float]]:
        groups = make_optimizer(model, settings, is_head).param_groups
        return sorted((tuple(x.shape), one["lr"], one["weight_decay"]) for one in groups for x in one["params"])

    model, rates = make(config), find_rates(make(config))
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2 and "score" not in name]
    put_on_grids(model, begin(model, dict.fromkeys(names, Wanted(4, 16, symmetric=False))))
    assert find_rates(model) == rates


def test_what_makes_no_sense_is_said_at_submit() -> None:
    def problems(*stages: dict[str, Any]) -> list[tuple[str, str]]:
        with pytest.raises(SpecInvalid) as caught:
            load_spec(SPEC | {"stages": list(stages)})
        return [(detail["field"], detail["message"]) for detail in caught.value.details]

    quantize = {"kind": "quantize"}
    [(field, message)] = problems(quantize, {"kind": "sparsify"})
    assert (field, "'sparsify', takes weights off their grids" in message) == ("stages.0.kind", True)
    [(field, message)] = problems(quantize, quantize)
    assert (field, "stage 1, 'quantize'" in message) == ("stages.0.kind", True)
    [(field, message)] = problems(quantize | {"bits": 8, "sensitive_share": 0.1})
    assert (field, "choose fewer bits" in message) == ("stages.0.sensitive_share", True)
    assert problems(quantize | {"sensitive_share": 1.0})[0][0] == "stages.0.sensitive_share"
    assert problems(quantize | {"embedding_bits": 3})[0][0] == "stages.0.embedding_bits"
    assert problems(quantize | {"bits": 5})[0][0] == "stages.0.bits"
    assert problems(quantize | {"group": 48})[0][0] == "stages.0.group"


@pytest.mark.parametrize(
    ("settings", "is_advised"),
    [
        ({}, False),
        ({"bits": 8}, True),
        ({"embedding_bits": 8}, True),
        ({"sensitive_share": 0.1}, True),
        ({"sensitive_share": 0.1, "symmetric": True}, False),
    ],
    ids=str,
)
def test_codes_that_a_form_would_not_keep_are_told_of(settings: dict[str, Any], is_advised: bool) -> None:
    stages = [{"kind": "quantize"} | settings, {"kind": "export", "formats": [{"kind": "gguf"}]}]
    spec = load_spec(SPEC | {"task": {"kind": "causal_lm"}, "stages": stages})
    assert [problem.field for problem in spec.stages[0].advise(spec)] == ["symmetric"] * is_advised


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 32, None])
def test_codes_that_a_file_of_llama_cpp_has_no_form_for_are_told_of(bits: int, group: int | None) -> None:
    """Its forms of 4 and 8 bits have a scale for each 32 weights."""
    stages = [
        {"kind": "quantize", "bits": bits, "group": group},
        {"kind": "export", "formats": [{"kind": "gguf"}]},
    ]
    spec = load_spec(SPEC | {"task": {"kind": "causal_lm"}, "stages": stages})
    told = ["bits"] * (bits != 4) + ["group"] * (group == 16)
    assert [problem.field for problem in spec.stages[0].advise(spec)] == told


@pytest.mark.parametrize(("bits", "told"), [(4, [1, 2, 3, 5]), (8, [])])
def test_forms_that_keep_no_codes_are_told_of(bits: int, told: list[int]) -> None:
    kinds = ["safetensors", "onnx", "onnx_int8", "openvino", "onnx_int4", "triton", "kserve"]
    forms: list[dict[str, Any]] = [{"kind": kind} for kind in kinds]
    forms[-1]["form"] = {"kind": "onnx_int4"}
    stages = [{"kind": "quantize", "bits": bits}, {"kind": "distill"}, {"kind": "export", "formats": forms}]
    spec = load_spec(SPEC | {"stages": stages})
    assert [problem.field for problem in spec.stages[2].advise(spec)] == [f"formats.{index}" for index in told]
    spec = load_spec(SPEC | {"stages": [{"kind": "distill"}, {"kind": "export", "formats": forms}]})
    assert spec.stages[1].advise(spec) == []


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    """At submit where the widths are known, and else when the stage starts."""
    bench = Bench(tmp_path).lay()
    tensors = read_tensors(bench.inputs / "teacher" / "model.safetensors")
    facts = read_facts(json.loads((bench.inputs / "teacher" / "config.json").read_text()), tensors=tensors)

    def problems(student: dict[str, Any], *stages: dict[str, Any]) -> list[str]:
        spec = load_spec(SPEC | {"student": student, "stages": list(stages)})
        return [problem.message for stage in spec.stages for problem in stage.check_model(spec, facts)]

    thirds = {"kind": "sparsify", "pattern": "3:7"}
    assert "32 do not divide the 48 inputs" in problems(STUDENT, {"kind": "quantize", "group": 32})[0]
    assert "7 do not divide the 32 inputs" in problems(STUDENT, thirds)[0]
    narrow = STUDENT | {"intermediate_size": 32}
    assert (
        problems(STUDENT, {"kind": "quantize", "group": 16})
        == problems(narrow, {"kind": "quantize", "group": 32})
        == []
    )
    assert "7 do not divide the 32 inputs" in problems(STUDENT, {"kind": "prune", "intermediate_size": 32}, thirds)[0]
    finished = bench.run(make_spec([{"kind": "quantize", "group": 256}]))
    assert finished.last["type"] == "error"
    assert "do not divide the 32 inputs" in finished.last["message"]
