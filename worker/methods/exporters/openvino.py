"""A model of OpenVINO."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext

BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.05}


class Openvino(Exporter):
    """Writes `model.xml` and `model.bin` with tokenizer and labels, for Intel's processors, GPUs and NPUs.

    It is compared and measured in OpenVINO on the processor, with arithmetic in single precision. OpenVINO itself takes
    bfloat16 on processors that have it, which is faster and less exact; set its `INFERENCE_PRECISION_HINT` to `f32` to
    have what was measured. The worker needs the extra `openvino`.
    """

    lacking_types: ClassVar[tuple[str, ...]] = ("flaubert", "fnet", "funnel", "longformer", "xlm")
    is_default: ClassVar[bool] = False
    has_no_codes: ClassVar[bool] = True

    kind: Literal["openvino"] = "openvino"
    precision: Literal["float32", "float16", "int8"] = Field(
        "float16",
        description="What weights are stored in: 'float16' is as fast; 'int8' has a scale for each output or token.",
    )
    min_agreement: Agreement = 0.95

    @property
    def bytes_per_parameter(self) -> float:  # type: ignore[override]
        """About what it takes to store one."""
        return BYTES[self.precision]

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.extras import needing

        with needing("openvino"):
            from worker.engine.openvino_files import write_openvino

        return lambda folder: write_openvino(ctx, self, folder)
