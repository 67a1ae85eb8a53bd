"""ONNX with weights in 4 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class OnnxInt4(Exporter):
    """Writes `model.onnx` with matrices packed in codes of 4 bits, and embeddings in 8 or 4.

    What a `quantize` stage put on grids keeps its codes, in 8 bits where it gave these. Of all else each weight is
    rounded to the nearest value. Rows that 16 does not divide stay in single precision: the stage warns of them, and
    fails where all are such. onnxruntime is the runtime for it (its `MatMulNBits` and `GatherBlockQuantized`); its
    answers must agree with the student's.
    """

    bytes_per_parameter: ClassVar[float] = 0.9
    is_graph: ClassVar[bool] = True
    is_default: ClassVar[bool] = False

    kind: Literal["onnx_int4"] = "onnx_int4"
    min_agreement: Agreement = 0.95
    group: Literal[16, 32, 64, 128, 256] = Field(
        32, description="How many weights share a scale, where no `quantize` stage has chosen."
    )
    embedding_bits: Literal[4, 8] | None = Field(
        8, description="Bits of embeddings, where no `quantize` stage has chosen; null leaves them as they are."
    )
    compute: Literal["int8", "float32"] = Field(
        "int8", description="Type that matrices are multiplied in: 'int8' is faster, and rounds what they get."
    )

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.packing import write_onnx_int4

        return lambda folder: write_onnx_int4(ctx, self, folder)
