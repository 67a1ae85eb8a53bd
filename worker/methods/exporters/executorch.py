"""A program of ExecuTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import UNTRACED, Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext

BYTES = {"float32": 4.0, "int8": 1.05, "int4": 0.8}


class Executorch(Exporter):
    """Writes `model.pte` with tokenizer and labels, for apps on phones, where XNNPACK runs it.

    Its method `forward` takes one text, of two tokens up to as many as the tokenizer leaves it: `input_ids`,
    `attention_mask` and, where the tokenizer makes them, `token_type_ids`, in this order and in 64 bits. It gives the
    logits first. With `int8` or `int4` the app must have ExecuTorch's quantised operators, which look up embeddings.
    The program is loaded again and compared with the student; how fast a phone is cannot be measured here. Lowering
    takes some seconds a layer. The worker needs the extra `executorch`.
    """

    lacking_types: ClassVar[tuple[str, ...]] = (*UNTRACED, "canine")
    is_default: ClassVar[bool] = False
    is_measured: ClassVar[bool] = False
    has_no_codes: ClassVar[bool] = True

    kind: Literal["executorch"] = "executorch"
    precision: Literal["float32", "int8", "int4"] = Field(
        "float32",
        description="What weights are stored in: 'int8' has a scale for each output or token, and what goes into "
        "layers is in 8 bits, too; 'int4' has a scale for 32 weights of a layer, and all but layers in 8 bits.",
    )
    min_agreement: Agreement = 0.99

    @property
    def bytes_per_parameter(self) -> float:  # type: ignore[override]
        """About what it takes to store one."""
        return BYTES[self.precision]

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.extras import needing

        with needing("executorch"):
            from worker.engine.executorch_files import write_executorch

        return lambda folder: write_executorch(ctx, self, folder)
