"""Weights on grids of few values, and the form that packs their codes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification as Classifier

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import read_facts
from core.models.safetensors_header import read_tensors
from tests.engine_bench import FAST, Bench, contents, make_spec
from tests.unit.test_engine_models import CONFIGS, make
from tests.unit.test_engine_sparsity import SPEC, TASK, matrices
from worker.engine.matrices import find_matrices
from worker.engine.quantizing import Wanted, put_on_grids, read_grids, settle
from worker.engine.runtimes import count_onnx_parameters, open_session, run_session
from worker.kernels.grids import decode, encode

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
    tokens, width = TASK["block_tokens"], new.config.hidden_size
    flops = 2 * tokens * products + new.config.num_hidden_layers * 4 * tokens**2 * width
    assert summary["flops"] == summary["flops_before"] == pytest.approx(flops, rel=0.01)


def test_fewer_bits_cost_more_and_gptq_less_than_the_nearest(walks: Bench, tmp_path: Path) -> None:
    lost = {}
    for bits, method in ((2, RTN), (2, GPTQ), (4, RTN), (8, GPTQ)):
        _, _, summary = quantize_language(walks, tmp_path / f"{bits}{method['kind']}", bits=bits, method=method)
        before, after = (summary[name]["loss"] for name in ("validation_before", "validation"))
        lost[bits, method["kind"]] = after - before
    assert lost[2, "rtn"] > lost[2, "gptq"] > lost[8, "gptq"]
    assert lost[2, "rtn"] > lost[4, "rtn"]
    assert abs(lost[8, "gptq"]) < 0.01


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_every_model_has_its_matrices_found(config: Any) -> None:
    model = make(config)
    found = {matrix.name: matrix.weight_OI for layer in find_matrices(model) for matrix in layer}
    assert {name.removesuffix(".weight") for name in found} == set(matrices(model))
    assert all(
        torch.equal(weight_OI, matrices(model)[name.removesuffix(".weight")]) for name, weight_OI in found.items()
    )


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=lambda config: config.model_type)
@pytest.mark.parametrize("wanted", [Wanted(4, 16, symmetric=False), Wanted(8, None, symmetric=True)], ids=str)
def test_in_training_a_model_is_the_rounded_one(config: Any, wanted: Wanted) -> None:
    """Values are those that stay; the derivative by a weight is that by its rounded one."""
    model, ids = make(config).eval(), torch.arange(3, 23).reshape(2, 10)
    put_on_grids(model, wanted)
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


def test_a_model_that_hears_what_it_was_before_regains_what_rounding_cost() -> None:
    model, ids = make(CONFIGS[0]).eval(), torch.randint(3, 60, (32, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight_OI in matrices(model).values():
            weight_OI *= 5  # else little of the answers hangs on the layers
        wanted = model(input_ids=ids).logits
    put_on_grids(model, Wanted(3, 16, symmetric=False))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(50):
        loss = (model(input_ids=ids).logits - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    settle(model)
    assert (model(input_ids=ids).logits - wanted).square().mean().item() < 0.5 * losses[0]


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
    spoiled_OI[:, 0] = 100 * weight_OI.abs().amax()
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


@pytest.mark.parametrize(("bits", "group"), [(3, None), (4, 16)])
def test_a_quantised_student_is_packed_without_loss(bench: Bench, group: int | None, bits: int, tmp_path: Path) -> None:
    stages = [{"kind": "quantize", "group": group, "bits": bits}, {"kind": "export", "formats": [EXACT]}]
    inputs = go_on(bench, tmp_path, *stages)
    folder, student = inputs / "onnx_int4", Classifier.from_pretrained(inputs / "student")
    for text in ("a b c", "one two three four"):
        tokens, logits = read(folder, text)
        with torch.no_grad():
            np.testing.assert_allclose(logits, student(**tokens).logits.numpy(), atol=1e-4)
    graph = onnx.load(folder / "model.onnx").graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == len(matrices(student))
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
    stages = [{"kind": "quantize", "group": 16, "bits": 2}, {"kind": "distill", **FAST}]
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
    for name, weight_OI in matrices(model).items():
        grid = grids[f"{name}.weight"]
        assert max(len(group.unique()) for group in weight_OI.reshape(-1, 16)) <= 4
        torch.testing.assert_close(decode(encode(weight_OI, grid), grid), weight_OI)
    work.adopt(trained, 2, "distill")
    assert work.succeed(spec, 3, "exported").last["summary"]["formats"]["onnx_int4"]["max_logit_difference"] < 1e-4


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
    [(field, message)] = problems(quantize | {"bits": 8}, {"kind": "export", "formats": [{"kind": "onnx_int4"}]})
    assert (field, "use 4" in message) == ("stages.0.bits", True)
    assert problems(quantize | {"bits": 5})[0][0] == "stages.0.bits"
    assert problems(quantize | {"group": 48})[0][0] == "stages.0.group"


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
    assert problems(STUDENT, {"kind": "prune", "intermediate_size": 32}, thirds) == []
    finished = bench.run(make_spec([{"kind": "quantize", "group": 256}]))
    assert finished.last["type"] == "error"
    assert "do not divide the 32 inputs" in finished.last["message"]
