"""Single-label text classification."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.datasets.checking import check_row, label_name
from core.methods import ENCODER_FORMS, RowProblem, Task

if TYPE_CHECKING:
    from worker.engine.classification import Classification
    from worker.engine.context import StageContext


class TextClassification(Task):
    """Puts each text, or each pair of texts, into one of the classes that the training split names."""

    forms: ClassVar[tuple[str, ...]] = ENCODER_FORMS
    shares_trunk: ClassVar[bool] = True
    min_labels: ClassVar[int] = 2

    kind: Literal["text_classification"] = "text_classification"
    text: str = Field("text", description="Column that holds the text.")
    pair: str | None = Field(
        None, description="Column that holds a second text, where the class is of two: premise and hypothesis, say."
    )
    label: str = Field("label", description="Column that holds the class.")

    def columns(self) -> dict[str, str]:
        """Returns the columns by role."""
        return {"text": self.text, "label": self.label} | ({"pair": self.pair} if self.pair else {})

    def read_labels(self, row: dict[str, Any]) -> tuple[list[RowProblem], list[str]]:
        """Returns what is wrong with text and class, and the class."""
        name = label_name(row.get(self.label))
        wrong = check_row(row, self.text, self.label) + check_row(row, self.pair, None)
        return wrong, [] if name is None else [name]

    def build(self, ctx: "StageContext") -> "Classification":
        """Returns the classifying run."""
        from worker.engine.classification import Classification

        return Classification(ctx, self.columns())
