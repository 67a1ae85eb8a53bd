"""Safetensors with config and tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext

BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


class Safetensors(Exporter):
    """Writes a folder that `transformers` loads with `from_pretrained`, from version 4.57 on.

    In half precision it is half as large, and its answers must agree with the student's. Version 5 loads it in the type
    that it is stored in, as it is compared and measured here, and 4.57 does with `dtype="auto"`. A processor without
    arithmetic in that type needs several times as long. Weights on a grid are rounded as all others are.
    """

    kind: Literal["safetensors"] = "safetensors"
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="Type of the weights: 'float16' is the more exact half, and 'bfloat16' has room for numbers above "
        "65,504.",
    )
    min_agreement: Agreement = 0.95

    @property
    def bytes_per_parameter(self) -> float:  # type: ignore[override]
        """About what it takes to store one."""
        return BYTES[self.dtype]

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.exporting import write_safetensors

        return lambda folder: write_safetensors(ctx, self, folder)
