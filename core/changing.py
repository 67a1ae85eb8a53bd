"""What every stage that changes a model does alike."""

from typing import TYPE_CHECKING, ClassVar

from core.methods import ModelFacts, Problem, Stage

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec


class ModelStage(Stage):
    """A stage that makes another model of the student, or of the one that its field `of` names."""

    forgets: ClassVar[bool] = False  # something that a training brings back

    @property
    def role(self) -> str:
        """The role of the model that it changes."""
        return getattr(self, "of", "student")

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the teacher's role, unless it is a student that starts from another model."""
        return set() if self.role == "student" and spec.student.source() else {"teacher"}

    def writes(self) -> set[str]:
        """Returns the role of the model."""
        return {self.role}

    def layered(self) -> list[str]:
        """Returns the fields of what needs layers that each have weights of their own."""
        return []

    @property
    def group_size(self) -> int:
        """How many weights in a row it takes together, which must divide the row's length."""
        return 1

    def undivided(self, spec: "JobSpec", start: ModelFacts) -> int | None:
        """Returns the inputs of a matrix that its groups do not divide, as far as it is known how wide it is."""
        if self.role == "student":
            widths = spec.student.widths(start)
        else:
            widths = start.composition.widths if start.composition else None
        if widths is None or any(stage.resizes for stage in spec.stages):
            return None
        return widths.undivided(self.group_size)

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether nothing brings back what is forgotten."""
        if not self.forgets or any(s.trains and self.role in s.writes() for s in self.later(spec).values()):
            return []
        return [
            Problem("kind", f"nothing trains the {self.role} after it; a 'distill' stage brings back what it loses")
        ]
