"""Token classification, as named entities."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.datasets.checking import check_tags
from core.methods import ENCODER_FORMS, RowProblem, Task

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.tagging import Tagging


class TokenClassification(Task):
    """Finds entities: each word of a text gets a tag, `B-kind` where an entity begins, `I-kind` inside, else `O`.

    A word's tag is that of its first piece. Scores are of whole entities, right only with both ends and the kind.

    Paper: Tjong Kim Sang, De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task: Language-Independent Named
    Entity Recognition", section 2.3 (entity F1).
    """

    forms: ClassVar[tuple[str, ...]] = ENCODER_FORMS
    shares_trunk: ClassVar[bool] = True
    min_labels: ClassVar[int] = 2

    kind: Literal["token_classification"] = "token_classification"
    tokens: str = Field("tokens", description="Column that holds the words, a list of strings.")
    tags: str = Field("tags", description="Column that holds their tags (IOB2), a list as long.")

    def columns(self) -> dict[str, str]:
        """Returns the columns by role."""
        return {"tokens": self.tokens, "tags": self.tags}

    def read_labels(self, row: dict[str, Any]) -> tuple[list[RowProblem], list[str]]:
        """Returns what is wrong with words and tags, and the tags."""
        wrong = check_tags(row, self.tokens, self.tags)
        return wrong, [] if wrong else row[self.tags]

    def build(self, ctx: "StageContext") -> "Tagging":
        """Returns the tagging run."""
        from worker.engine.tagging import Tagging

        return Tagging(ctx, self.columns())
