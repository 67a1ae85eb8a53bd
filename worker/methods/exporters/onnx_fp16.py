"""ONNX in half precision."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class OnnxFp16(Exporter):
    """Writes `model.onnx` with weights and arithmetic in half precision; inputs and logits stay as they are.

    Half the size everywhere, and faster where half precision is: on GPUs, in browsers, on many phones. A desktop's
    processor may need longer for it.
    """

    bytes_per_parameter: ClassVar[float] = 2.0
    is_graph: ClassVar[bool] = True
    is_default: ClassVar[bool] = False
    has_no_codes: ClassVar[bool] = True

    kind: Literal["onnx_fp16"] = "onnx_fp16"
    min_agreement: Agreement = 0.99

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.exporting import write_onnx_fp16

        return lambda folder: write_onnx_fp16(ctx, self, folder)
