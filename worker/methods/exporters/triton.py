"""A model of NVIDIA Triton's repository."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from core.methods import UNTRACED, Exporter
from core.registry import OneOf

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Triton(Exporter):
    """Writes a folder that is a model of a Triton repository: `config.pbtxt`, `1/model.onnx`, labels and tokenizer.

    Copy it into the repository under the name that the model is to have. Triton takes tokens, so a client reads texts
    by the `tokenizer.json` beside them. The graph is that of another form, which is checked as it is alone.

    Source: NVIDIA Triton Inference Server, "Model Configuration".
    """

    lacking_types: ClassVar[tuple[str, ...]] = UNTRACED
    is_default: ClassVar[bool] = False
    is_measured: ClassVar[bool] = False

    kind: Literal["triton"] = "triton"
    form: Annotated[Exporter, OneOf(only="is_graph")] = Field(
        default={"kind": "onnx_int8"}, validate_default=True, description="The form of the graph."
    )
    max_batch_size: int = Field(64, ge=1, le=65_536, description="Most texts in one batch.")
    max_queue_delay_us: int = Field(
        1000,
        ge=0,
        le=10_000_000,
        description="How long a text waits for others of its batch, in microseconds.",
    )

    @property
    def bytes_per_parameter(self) -> float:  # type: ignore[override]
        """About what it takes to store one in the graph."""
        return self.form.bytes_per_parameter

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        """Whether the graph's form looks at the training split."""
        return self.form.calibrates

    @property
    def has_no_codes(self) -> bool:  # type: ignore[override]
        """Whether the graph has none."""
        return self.form.has_no_codes

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the folder and returns what the check of the graph measured."""
        from worker.engine.serving import write_triton

        return lambda folder: write_triton(ctx, self, folder)
