"""Regression on texts."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.datasets.checking import check_row, check_value
from core.methods import ENCODER_FORMS, RowProblem, Task

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.regression import Regression


class TextRegression(Task):
    """Gives each text, or each pair of texts, a number: a rating, a price, how alike the two are.

    The numbers are learned as they are, from their mean on. A spread of about 1 suits the default learning rates; an
    event warns of one that is far from it.
    """

    forms: ClassVar[tuple[str, ...]] = ENCODER_FORMS
    shares_trunk: ClassVar[bool] = True
    gives_values: ClassVar[bool] = True
    min_labels: ClassVar[int] = 1
    label_loss: ClassVar[str] = "squared_error"

    kind: Literal["text_regression"] = "text_regression"
    text: str = Field("text", description="Column that holds the text.")
    pair: str | None = Field(None, description="Column that holds a second text, where the number is of two.")
    value: str = Field("value", description="Column that holds the number; the model's one label is called so.")

    def stage_defaults(self) -> dict[str, dict[str, Any]]:
        """Returns the losses of a distillation."""
        return {"distill": {"losses": [{"kind": "squared_error"}, {"kind": "logit_mse"}]}}

    def columns(self) -> dict[str, str]:
        """Returns the columns by role."""
        return {"text": self.text, "value": self.value} | ({"pair": self.pair} if self.pair else {})

    def read_labels(self, row: dict[str, Any]) -> tuple[list[RowProblem], list[str]]:
        """Returns what is wrong with text and number, and the column's name as the one label."""
        wrong = check_row(row, self.text, None) + check_row(row, self.pair, None) + check_value(row, self.value)
        return wrong, [self.value]

    def build(self, ctx: "StageContext") -> "Regression":
        """Returns the regression run."""
        from worker.engine.regression import Regression

        return Regression(ctx, self.columns())
