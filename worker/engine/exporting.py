"""Deployable forms of the student, each compared with the student before it is published."""

import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.fusing import fuse
from worker.engine.inference import as_answer
from worker.engine.loading import save_labels, save_tokenizer
from worker.engine.portable import write_model
from worker.engine.runtimes import continue_greedily, open_session, run_session
from worker.engine.students import take_sample
from worker.engine.tracing import describe_classifier, describe_decoder, write_graph
from worker.engine.tying import find_tied, share_codes, share_table

if TYPE_CHECKING:
    from worker.methods.exporters.onnx import Onnx
    from worker.methods.exporters.onnx_fp16 import OnnxFp16
    from worker.methods.exporters.onnx_int8 import OnnxInt8
    from worker.methods.exporters.safetensors import Safetensors
    from worker.methods.stages.export import Export

EQUAL_LOGITS = 1e-5  # the same weights in the same library; only the attention kernel may differ
MERGED_LOGITS = 1e-3  # or what lay beside them was added to them
MAX_GRAPH_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB, with the nodes
CONTINUED_BLOCKS, NEW_TOKENS = 8, 16  # on which a cache is tried
WIDER = "Choose 'bfloat16', which has numbers as large as float32, where the form has it, or leave the form out."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The student with the examples on which its forms are compared, and what it says of them.

    `data` is what the task's `sample` gives, and `answers` what its `logits` does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: Any
    answers: Any


def export(ctx: StageContext, settings: "Export") -> dict[str, Any]:
    """Writes and checks every form; returns what each check measured."""
    measured: dict[str, Any] = {}
    for index, form in enumerate(settings.formats):
        ctx.progress(index, len(settings.formats))
        folder = ctx.output(form.kind)
        with ctx.reporter.phase(f"write {form.kind}"):
            measured[form.kind] = form.build(ctx)(folder)
        log.info("%s: %s", form.kind, measured[form.kind])
        for name, value in measured[form.kind].items():
            ctx.reporter.metric(f"{form.kind}/{name}", 0, value)
    ctx.progress(len(settings.formats), len(settings.formats))
    return {"formats": measured}


def write_safetensors(ctx: StageContext, settings: "Safetensors", folder: Path) -> dict[str, float]:
    """Writes the student for `from_pretrained`, loads it again as it is stored, and returns how far it agrees.

    Raises:
        StageFailed: `export_unsupported` where logits differ in single precision, or half precision cannot hold them or
            a weight, `goal_missed` when too few labels agree in half precision.
    """
    reference, form = get_reference(ctx), settings.kind
    is_exact = settings.dtype == "float32"
    model = reference.model if is_exact else _load_half(ctx, settings.dtype)
    ctx.task.save_model(model, reference.tokenizer, folder)
    again = ctx.task.load_model(folder, attn_implementation="eager", dtype="auto")
    answers = ctx.task.logits(as_answer(again), reference.data, ctx.check_stop)
    if is_exact:
        return measure(ctx, reference, answers, form, EQUAL_LOGITS)
    return measure_agreement(ctx, reference, answers, form, settings.min_agreement)


def _load_half(ctx: StageContext, dtype: str) -> PreTrainedModel:
    """Returns the student in half precision. Raises StageFailed: `export_unsupported` where a weight is too large."""
    half: torch.dtype = getattr(torch, dtype)
    model = ctx.load_model("student", dtype=half)
    lost = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if lost:
        message = f"'{lost}' has numbers above {torch.finfo(half).max:,.10g}, the largest of '{dtype}'."
        raise StageFailed("export_unsupported", message, suggestion=WIDER)
    return model


def write_onnx(ctx: StageContext, settings: "Onnx", folder: Path) -> dict[str, float]:
    """Writes the student as ONNX, runs it in onnxruntime, and returns the largest difference of a logit."""
    reference = get_reference(ctx)
    proto = onnx.load(make_onnx(ctx))
    share_table(proto.graph)
    save_graph(proto, folder)
    write_companions(ctx, reference, folder)
    return measure_onnx(ctx, folder, partial(measure, ctx, form="onnx", tolerance=settings.tolerance))


def write_onnx_int8(ctx: StageContext, settings: "OnnxInt8", folder: Path) -> dict[str, float]:
    """Writes the student as ONNX with 8-bit weights, and returns its agreement with the student.

    Raises:
        StageFailed: `goal_missed` when too few labels agree.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, coded, reference = make_onnx(ctx), ctx.scratch_dir / "int8.onnx", get_reference(ctx)
    if settings.fuse and not reference.model.can_generate():
        fused = ctx.scratch_dir / "fused"
        fused.mkdir(exist_ok=True)
        save_graph(fuse(onnx.load(graph), reference.model.config), fused)
        graph = fused / "model.onnx"
    quantize_dynamic(
        graph,
        coded,
        weight_type=QuantType.QUInt8 if settings.weights == "uint8" else QuantType.QInt8,
        per_channel=settings.per_channel,
        reduce_range=settings.reduce_range,
        op_types_to_quantize=["MatMul", "Gemm", "Gather", "Attention"],
        use_external_data_format=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # after what is fused, types are not known
    )
    proto = onnx.load(coded)
    for tied in find_tied(onnx.load(graph).graph):
        share_codes(proto.graph, tied)
    save_graph(proto, folder)
    return check_onnx(ctx, folder, "onnx_int8", settings.min_agreement)


def write_onnx_fp16(ctx: StageContext, settings: "OnnxFp16", folder: Path) -> dict[str, float]:
    """Writes the student as ONNX in half precision, and returns its agreement with the student.

    Raises:
        StageFailed: `goal_missed` when too few labels agree.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    reference = get_reference(ctx)
    if reference.model.can_generate():  # which knows where half precision is too coarse
        halved = replace(reference, model=copy.deepcopy(reference.model).half())
        proto = onnx.load(_export_graph(ctx, halved, ctx.scratch_dir / "onnx_half"))
        share_table(proto.graph)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of each number that is rounded to what half precision has
            proto = convert_float_to_float16(str(make_onnx(ctx)), keep_io_types=True)
    save_graph(proto, folder)
    return check_onnx(ctx, folder, "onnx_fp16", settings.min_agreement)


def check_onnx(ctx: StageContext, folder: Path, form: str, least: float) -> dict[str, float]:
    """Writes what belongs to a graph, and returns what `measure_agreement` does of it."""
    write_companions(ctx, get_reference(ctx), folder)
    return measure_onnx(ctx, folder, partial(measure_agreement, ctx, form=form, least=least))


def measure_onnx(
    ctx: StageContext, folder: Path, judge: Callable[[Reference, Any], dict[str, float]]
) -> dict[str, float]:
    """Returns what `judge` says of a folder with `model.onnx`, by its answers to the sample.

    A decoder goes on after the first half of some blocks as well, and reads each token that it writes with what it has
    kept of those before; the student reads all of these texts at once.
    """
    reference = get_reference(ctx)
    measured = judge(reference, run_onnx(ctx, reference.data, folder))
    if not reference.model.can_generate():
        return measured
    blocks = np.arange(min(CONTINUED_BLOCKS, len(reference.data)))
    ids_BT = reference.data.batch(blocks, torch.device("cpu")).inputs["input_ids"]
    begun, wanted = ids_BT.shape[1] // 2, min(NEW_TOKENS, ids_BT.shape[1] // 2)
    ids_BS, logits_BNV = continue_greedily(open_session(folder, ctx.num_threads), ids_BT[:, :begun], wanted)
    expected_BNV = as_answer(reference.model)({"input_ids": ids_BS})[:, begun - 1 : -1]
    written = replace(reference, data=ids_BS[:, begun:].flatten(), answers=expected_BNV.flatten(0, 1))
    found = judge(written, logits_BNV.flatten(0, 1))
    return measured | {f"cached_{name}": value for name, value in found.items()}


def measure_agreement(
    ctx: StageContext, reference: Reference, answers: Any, form: str, least: float
) -> dict[str, float]:
    """Returns what `measure` does of a form that is not exact. Raises StageFailed: `goal_missed` below `least`."""
    measured = measure(ctx, reference, answers, form, None)
    if measured["agreement"] < least:
        raise StageFailed(
            "goal_missed",
            f"{form} agrees with the student to {measured['agreement']:.2%} on {len(reference.data)} examples, and "
            f"min_agreement is {least:.2%}.",
            suggestion="Lower min_agreement, choose other weights, or leave this form out.",
        )
    return measured


def get_reference(ctx: StageContext) -> Reference:
    """Returns the student and its logits for some of the validation split (else of the train split), made once."""

    def make() -> Reference:
        model = ctx.load_model("student", attn_implementation="eager").eval()
        tokenizer = ctx.load_tokenizer("student")
        data = take_sample(ctx, model, tokenizer)
        return Reference(model, tokenizer, data, ctx.task.logits(as_answer(model), data, ctx.check_stop))

    return ctx.remember("reference", make)


def make_onnx(ctx: StageContext) -> Path:
    """Returns the student as an ONNX file in the scratch folder, made once a stage.

    Raises:
        StageFailed: `export_unsupported` when the graph cannot be exported.
    """
    return ctx.remember("onnx", lambda: _export_graph(ctx, get_reference(ctx), ctx.scratch_dir / "onnx"))


def run_onnx(ctx: StageContext, data: Any, folder: Path) -> Any:
    """Returns what a folder with `model.onnx` says of a sample.

    Raises:
        StageFailed: `export_unsupported` when onnxruntime does not run it.
    """
    try:
        session = open_session(folder, ctx.num_threads)
        return ctx.task.logits(lambda inputs: torch.from_numpy(run_session(session, inputs)), data, ctx.check_stop)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime."):
            raise
        message = f"The student's graph does not run in onnxruntime: {str(error).splitlines()[0]}"
        raise StageFailed("export_unsupported", message, suggestion="Leave the ONNX forms out.") from error


def save_graph(proto: onnx.ModelProto, folder: Path) -> None:
    """Writes `model.onnx`; weights that one protobuf message cannot hold go into `model.onnx.data` beside it."""
    size_bytes = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    apart = size_bytes > MAX_GRAPH_BYTES
    onnx.save(proto, folder / "model.onnx", save_as_external_data=apart, location="model.onnx.data")


def _export_graph(ctx: StageContext, reference: Reference, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    if reference.model.can_generate():
        graph = describe_decoder(reference.model)
    else:
        batch = next(iter(reference.data.shuffled(2, [0], 0, torch.device("cpu"))))
        graph = describe_classifier(reference.model, batch.inputs, ctx.task.heads)
    try:
        write_graph(graph, path)
    except (RuntimeError, TypeError, ValueError) as error:
        message = f"A '{reference.model.config.model_type}' cannot be exported to ONNX: {str(error).splitlines()[0]}"
        raise StageFailed("export_unsupported", message, suggestion="Leave the ONNX forms out.") from error
    if reference.model.can_generate() or any(isinstance(module, Conv1D) for module in reference.model.modules()):
        from onnxruntime.quantization.onnx_model import ONNXModel

        proto = ONNXModel(onnx.load(path))
        proto.replace_gemm_with_matmul()  # of GPT-2, so that its matrices are found as those of others
        save_graph(proto.model, folder)
    onnx.checker.check_model(str(path))
    return path


def write_companions(ctx: StageContext, reference: Reference, folder: Path) -> None:
    """Writes what belongs to every form that is not a folder of `transformers`: config, tokenizer, and labels.

    Of a decoder it is how it writes, instead of labels, and its tokenizer cuts no text.
    """
    is_decoder = reference.model.can_generate()
    write_model(reference.model.config, folder)
    save_tokenizer(reference.tokenizer, folder, truncate=not is_decoder)
    if is_decoder:
        reference.model.generation_config.save_pretrained(folder)
    else:
        save_labels(ctx.labels, folder)


def measure(
    ctx: StageContext, reference: Reference, answers: Any, form: str, tolerance: float | None
) -> dict[str, float]:
    """Returns the largest difference of a logit, and how far the answers agree.

    Raises:
        StageFailed: `export_unsupported` where logits are not finite, or differ by more than what is accepted.
    """
    difference, agreement = ctx.task.compare(answers, reference.answers)
    if not math.isfinite(difference):
        raise StageFailed("export_unsupported", f"The logits of {form} are not finite.", suggestion=WIDER)
    if tolerance is not None and difference > tolerance:
        raise StageFailed(
            "export_unsupported",
            f"The logits of {form} differ from the student's by up to {difference:.3g}; {tolerance:g} is accepted.",
            suggestion="Raise the form's tolerance if that is good enough for you, or leave the form out.",
        )
    return {"max_logit_difference": difference, "agreement": agreement}
