"""Forms whose scales are measured before they are written."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from worker.engine.context import StageContext
from worker.engine.exporting import check_onnx, get_reference, make_onnx, save_graph

if TYPE_CHECKING:
    from worker.methods.exporters.onnx_int8_static import OnnxInt8Static

METHODS = {
    "min_max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class Samples(CalibrationDataReader):
    """Texts of a split, one by one, so that no padding is measured."""

    def __init__(self, data: Any, count: int, seed: int) -> None:
        self._all = list(self._read(data, count, seed))
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return len(self._all)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Has only these texts come."""
        self._left = iter(self._all[start_index:end_index])

    def _read(self, data: Any, count: int, seed: int) -> Iterator[dict[str, NDArray[Any]]]:
        batches = data.shuffled(1, [seed], 0, torch.device("cpu"))
        for batch, _ in zip(batches, range(count), strict=False):
            yield {name: ids_BT[batch.is_token].numpy()[None] for name, ids_BT in batch.inputs.items()}

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Returns the next inputs, or None after the last."""
        return next(self._left, None)


def write_onnx_int8_static(ctx: StageContext, settings: "OnnxInt8Static", folder: Path) -> dict[str, float]:
    """Writes the student as ONNX with fixed scales, and returns its agreement with the student.

    Raises:
        StageFailed: `goal_missed` when too few labels agree.
    """
    reference = get_reference(ctx)
    data = ctx.task.calibrate(ctx.get_split("train"), reference.model, reference.tokenizer)
    coded = ctx.scratch_dir / "int8_static.onnx"
    quantize_static(
        make_onnx(ctx),
        coded,
        Samples(data, settings.num_samples, ctx.seed),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=settings.per_channel,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        calibrate_method=METHODS[settings.method],
        use_external_data_format=True,
        extra_options={"CalibStridedMinMax": 1},  # text by text: they differ in length, and all of them take memory
    )
    save_graph(onnx.load(coded), folder)
    return check_onnx(ctx, folder, "onnx_int8_static", settings.min_agreement)
