"""ONNX with weights in 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class OnnxInt8(Exporter):
    """Writes `model.onnx` with dynamically quantised matrices; its answers must agree with the student's."""

    bytes_per_parameter: ClassVar[float] = 1.05  # scales, and norms and biases in single precision
    is_graph: ClassVar[bool] = True
    has_no_codes: ClassVar[bool] = True

    kind: Literal["onnx_int8"] = "onnx_int8"
    min_agreement: Agreement = 0.95
    weights: Literal["uint8", "int8"] = Field(
        "uint8",
        description="Type of the weights. 'uint8' agrees best and never overflows; 'int8' is 10 to 60 % faster, and on "
        "processors without VNNI needs `reduce_range` not to overflow.",
    )
    per_channel: bool = Field(True, description="One scale for each output column instead of one for each matrix.")
    fuse: bool = Field(
        True,
        description="Make one operator of each layer's attention, as onnxruntime has it: a fourth less time for one "
        "text. false keeps to operators of the ONNX standard, for other runtimes.",
    )
    reduce_range: bool = Field(False, description="Use 7 bits of a weight, so that sums of 'int8' products fit.")

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.exporting import write_onnx_int8

        return lambda folder: write_onnx_int8(ctx, self, folder)
