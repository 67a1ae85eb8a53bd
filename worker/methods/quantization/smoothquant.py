"""Grids of a model whose inputs of matrices are made easier to round."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from worker.methods.quantization.rtn import RoundToNearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from worker.engine.matrices import Matrix


class Smoothquant(RoundToNearest):
    """Makes loud inputs of matrices smaller and their weights larger, so that both can be rounded to 8 bits.

    The form that rounds inputs is `onnx_int8`; the student itself says what it said, but for its weights in 8 bits,
    each at the nearest value. The scale of an input, max|X|^α / max|W|^(1 - α), goes into what makes it: a norm, or the
    map before, wherever the model then says the same. A model none of whose norms can take one is refused.

    Paper: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    section 4. Deviation: inputs that another map makes, as values do, are scaled as well as those of norms.
    """

    needs_data: ClassVar[bool] = True
    needs_norms: ClassVar[bool] = True
    only: ClassVar[dict[str, Any]] = {"bits": 8, "group": None}

    kind: Literal["smoothquant"] = "smoothquant"  # type: ignore[assignment]
    alpha: float = Field(
        0.5, ge=0, le=1, description="How much of the rounding is moved from inputs to weights; more for louder inputs."
    )

    def build_scaling(self, ctx: Any) -> Any:
        """Returns the scale of what matrices hear."""
        from worker.kernels.smoothquant import smooth

        def scale(matrices: "list[Matrix]", _: "list[Callable[[Tensor], Tensor]]") -> "Tensor":
            return smooth(matrices[0].largest_I, [matrix.weight_OI for matrix in matrices], self.alpha)

        return scale
