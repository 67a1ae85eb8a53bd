"""ONNX with weights and activations in 8 bits, with scales that were measured beforehand."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class OnnxInt8Static(Exporter):
    """Writes `model.onnx` with matrices and what goes into them in 8 bits, at scales that the training split has shown.

    Accelerators without floating point need it so. On a processor `onnx_int8`, which measures each input as it comes,
    agrees better: a few large activations of a transformer widen a fixed scale.

    Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 2; entropy: Migacz 2017, "8-bit Inference with TensorRT".
    """

    bytes_per_parameter: ClassVar[float] = 1.05
    is_graph: ClassVar[bool] = True
    is_default: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    has_no_codes: ClassVar[bool] = True

    kind: Literal["onnx_int8_static"] = "onnx_int8_static"
    min_agreement: Agreement = 0.95
    method: Literal["min_max", "entropy", "percentile"] = Field(
        "min_max",
        description="What a scale spans: all that was seen (`min_max`), or what is left when rare numbers are cut "
        "so that least information is lost (`entropy`), or all but one in 100,000 (`percentile`).",
    )
    num_samples: int = Field(128, ge=16, le=1000, description="Training texts that are looked at.")
    per_channel: bool = Field(True, description="One scale for each output column of a weight.")

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.calibrating import write_onnx_int8_static

        return lambda folder: write_onnx_int8_static(ctx, self, folder)
