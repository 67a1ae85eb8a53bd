"""ONNX in single precision."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Onnx(Exporter):
    """Writes `model.onnx` with tokenizer and labels; its logits must equal the student's within `tolerance`.

    A language model takes `past_key_values.<layer>.key` and `.value` besides, and gives them on as `present`: one graph
    that starts with none of them and goes on with those of earlier tokens, as Optimum and transformers.js call it.
    """

    bytes_per_parameter: ClassVar[float] = 4.0
    is_graph: ClassVar[bool] = True
    has_no_codes: ClassVar[bool] = True

    kind: Literal["onnx"] = "onnx"
    tolerance: float = Field(1e-3, gt=0, description="Largest accepted difference of a logit.")

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.exporting import write_onnx

        return lambda folder: write_onnx(ctx, self, folder)
