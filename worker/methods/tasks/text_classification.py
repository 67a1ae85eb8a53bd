"""Single-label text classification."""

from typing import Literal

from pydantic import Field

from core.methods import Task


class TextClassification(Task):
    """Puts each text into one of the classes that the training split names."""

    kind: Literal["text_classification"] = "text_classification"
    text: str = Field("text", description="Column that holds the text.")
    label: str = Field("label", description="Column that holds the class.")

    def columns(self) -> dict[str, str]:
        """Returns the columns by role."""
        return {"text": self.text, "label": self.label}
