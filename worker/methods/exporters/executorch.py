"""A program of ExecuTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Executorch(Exporter):
    """Writes `model.pte` with tokenizer and labels, for apps on phones: XNNPACK runs it, in single precision.

    Its method `forward` takes one text, of two tokens up to as many as the tokenizer leaves it: `input_ids`,
    `attention_mask` and, where the tokenizer makes them, `token_type_ids`, in this order and in 64 bits. It gives the
    logits first. The program is loaded again and compared with the student; how fast a phone is cannot be measured
    here. Lowering takes some seconds a layer. The worker needs the extra `executorch`.
    """

    bytes_per_parameter: ClassVar[float] = 4.0
    is_default: ClassVar[bool] = False
    is_measured: ClassVar[bool] = False

    kind: Literal["executorch"] = "executorch"
    min_agreement: Agreement = 0.99

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.extras import needing

        with needing("executorch"):
            from worker.engine.executorch_files import write_executorch

        return lambda folder: write_executorch(ctx, self, folder)
