"""One file for llama.cpp."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.methods import Exporter

if TYPE_CHECKING:
    from worker.engine.context import StageContext

BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 1.0625, "q4_0": 0.5625}


class Gguf(Exporter):
    """Writes `model.gguf` with weights, tokenizer and chat template, for llama.cpp and what is built on it.

    Matrices and embeddings keep the codes of 4 bits, or of 8 symmetric ones, that a `quantize` stage gave them with a
    scale for 32 or more; `weights` is for all others. Those whose rows are not made of blocks of 32 stay in half
    precision. The file is read again and compared with the student before it is published.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    is_default: ClassVar[bool] = False
    is_measured: ClassVar[bool] = False

    kind: Literal["gguf"] = "gguf"
    weights: Literal["f32", "f16", "q8_0", "q4_0"] = Field(
        "q8_0",
        description="Form of the matrices: `q8_0` and `q4_0` have 8 and 4 bits a weight and one scale for 32.",
    )
    min_agreement: float = Field(
        0.9, gt=0, le=1, description="Least accepted share of tokens for which the file puts the same one first."
    )

    @property
    def bytes_per_parameter(self) -> float:  # type: ignore[override]
        """About what it takes to store one."""
        return BYTES[self.weights]

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.gguf_files import write_gguf

        return lambda folder: write_gguf(ctx, self, folder)
