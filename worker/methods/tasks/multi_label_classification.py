"""Text classification with any number of labels a text."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.datasets.checking import check_labels, check_row
from core.methods import ENCODER_FORMS, RowProblem, Task

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.multilabel import MultiLabel


class MultiLabelClassification(Task):
    """Gives each text all of the labels that fit it: any number of those that the training split names, or none.

    Each label is a decision of its own, yes or no, with the probability sigmoid(z); every loss that compares
    probabilities is the mean over texts and labels of that for the two of them. At temperature T they are sigmoid(z/T).

    Paper: Tsoumakas, Katakis 2007, "Multi-Label Classification: An Overview", section 2.1 (binary relevance).
    """

    forms: ClassVar[tuple[str, ...]] = ENCODER_FORMS
    shares_trunk: ClassVar[bool] = True
    min_labels: ClassVar[int] = 1

    kind: Literal["multi_label_classification"] = "multi_label_classification"
    text: str = Field("text", description="Column that holds the text.")
    pair: str | None = Field(None, description="Column that holds a second text, where the labels are of two.")
    labels: str = Field("labels", description="Column that holds the labels, a list of strings, which may be empty.")

    def columns(self) -> dict[str, str]:
        """Returns the columns by role."""
        return {"text": self.text, "labels": self.labels} | ({"pair": self.pair} if self.pair else {})

    def read_labels(self, row: dict[str, Any]) -> tuple[list[RowProblem], list[str]]:
        """Returns what is wrong with text and labels, and the labels."""
        wrong = check_row(row, self.text, None) + check_row(row, self.pair, None) + check_labels(row, self.labels)
        return wrong, [] if wrong else row[self.labels]

    def build(self, ctx: "StageContext") -> "MultiLabel":
        """Returns the classifying run."""
        from worker.engine.multilabel import MultiLabel

        return MultiLabel(ctx, self.columns())
