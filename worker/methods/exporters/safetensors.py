"""Safetensors with config and tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Safetensors(Exporter):
    """Writes a folder that `transformers` loads with `from_pretrained`, from version 4.57 on."""

    bytes_per_parameter: ClassVar[float] = 4.0

    kind: Literal["safetensors"] = "safetensors"

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.exporting import write_safetensors

        return lambda folder: write_safetensors(ctx, folder)
