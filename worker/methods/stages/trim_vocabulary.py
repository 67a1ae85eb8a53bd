"""Fewer tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.changing import ModelStage, Sizes
from core.methods import Problem

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class TrimVocabulary(ModelStage):
    """Leaves tokens that the data do not use out of a model and its tokenizer.

    A small encoder is mostly embeddings of words that its data never say. Texts of the tokens that stay are read and
    answered as before; another word is read in pieces, down to letters or bytes, so that every text can still be read.

    Paper: Abdaoui, Pradel, Sigel 2020, "Load What You Need: Smaller Versions of Multilingual BERT", section 3.

    Deviation: all single letters or bytes stay, and of merged tokens all that they are merged from.
    """

    resizes: ClassVar[bool] = True

    kind: Literal["trim_vocabulary"] = "trim_vocabulary"
    of: Literal["teacher", "student"] = Field("student", description="Which model to trim.")
    splits: list[Literal["train", "validation"]] = Field(
        ["train", "validation"], min_length=1, max_length=2, description="Whose tokens stay; splits that are there."
    )
    min_count: int = Field(1, ge=1, description="How often a token must occur to stay.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="How many tokens stay for their own sake, the most frequent ones; letters, bytes, special tokens "
        "and what the others are merged from are kept besides.",
    )
    keep_first: int = Field(
        0,
        ge=0,
        description="So many tokens of the lowest ids stay as well; in most tokenizers they are the language's most "
        "frequent ones, which keeps words whole that new texts may use.",
    )

    def resize(self, sizes: Sizes) -> Sizes:
        """Returns them without the rows of embeddings."""
        return sizes._replace(num_rows=None)

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong: a teacher that is no model, or a later stage that compares tokens."""
        if self.of == "teacher" and not spec.teacher.is_model:
            return [Problem("of", f"a '{spec.teacher.kind}' teacher has no vocabulary here; use 'student'")]
        if not any(spec.data.refs_of(split) for split in self.splits):
            return [Problem("splits", f"the job has no {' or '.join(self.splits)} split; name one of data")]
        comparing = self.find_comparing(spec)
        if comparing is None or (self.of == "teacher" and self._makes_student_of_it(spec)):
            return []
        why = f"'{comparing}' compares the student's tokens with the teacher's; "
        remedy = "leave it out, or make the student of what it leaves"
        if self.of == "student":
            remedy = "trim the teacher instead, before the student is made"
        return [Problem("of", why + remedy)]

    def _makes_student_of_it(self, spec: "JobSpec") -> bool:
        """Returns whether the student is made of the teacher after it, and so has the tokens that it leaves."""
        is_made = any("student" in stage.writes() for stage in self.earlier(spec))
        return spec.student.source() is None and not is_made

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the trimming run."""
        from worker.engine.trimming import trim

        return lambda: trim(ctx, self)
