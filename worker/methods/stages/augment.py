"""More texts to learn from, made of those that are given."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.losses import check_kept
from core.methods import Problem, Stage

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext


class Augment(Stage):
    """Makes copies of the texts of the training split with some words left out; every later stage trains on them, too.

    A teacher that has learned the texts by heart says little more of them than their labels; of texts that it has not
    seen it says how it judges. `distill` leaves out tokens by itself where the teacher is a model of the task. Put this
    stage before `answer`, so that an ensemble, a model of labels' words or an API is heard on such texts as well; each
    copy is a text more to answer and to pay for. An epoch then has as many more texts, so choose fewer of them.
    Words are what stands between spaces: of a language without them nothing is left out.

    Paper: Wei, Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification
    Tasks", section 2 (random deletion); Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple
    Neural Networks", section 3.2 (a teacher that answers such texts).
    """

    kind: Literal["augment"] = "augment"
    copies: int = Field(4, ge=1, le=100, description="Copies of each text, besides itself.")
    deletion_probability: float = Field(
        0.1, gt=0, lt=1, description="Share of the words that are left out of a copy, at random; one word stays."
    )

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the task, or answers to other texts that later stages would hear."""
        if not spec.task.reads_texts:
            why = f"a {spec.task.kind} has no texts whose words can be left out; leave the stage out"
            return [Problem("kind", why)]
        return check_kept(self, spec)

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns nothing."""
        return set()

    def writes(self) -> set[str]:
        """Returns the role of the texts."""
        return {"texts"}

    def build(self, ctx: "StageContext") -> Callable[[], dict[str, Any]]:
        """Returns the copying run."""
        from worker.engine.augmenting import augment

        return lambda: augment(ctx, self)
