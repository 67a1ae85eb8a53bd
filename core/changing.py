"""What every stage that changes a model does alike."""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from core.methods import Depths, ModelFacts, Problem, Stage, Widths

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec


class Sizes(NamedTuple):
    """How many layers a model has, how wide they are, and how many rows its embeddings, as far as that is known.

    Attributes:
        step: Where a goal is still to find the number of neurons, what it is a multiple of; `widths` has the most.
        may_be_shallower: Whether a goal is still to find the number of layers, and `num_layers` is the most.
    """

    num_layers: int | None
    widths: Widths | None
    num_rows: int | None
    step: int | None = None
    may_be_shallower: bool = False

    def undivided(self, group: int) -> int | None:
        """Returns the inputs of a layer's matrix that groups of so many do not divide; None if none are known."""
        return self.widths.undivided(group, "ha" if self.step else "hia") if self.widths else None


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

    def roles(self, spec: "JobSpec") -> set[str]:
        """Returns its role, and that of the model which a student is made of in the job."""
        return {self.role} | (set() if spec.student.source() else {"teacher"})

    def find_comparing(self, spec: "JobSpec") -> str | None:
        """Returns the kind of a later stage that compares the tokens of teacher and student, which must not differ."""
        return next((stage.kind for stage in self.later(spec).values() if stage.compares_tokens(spec)), None)

    def resize(self, sizes: Sizes) -> Sizes:
        """Returns the sizes of what it makes of a model with these; most stages change none."""
        return sizes

    def sizes_before(self, spec: "JobSpec", start: ModelFacts) -> Sizes:
        """Returns the sizes of the model as the stages before this one leave it, made of one with these facts."""
        num_layers, widths = start.num_layers, start.widths
        if self.role == "student":
            num_layers, widths = spec.student.count_layers(start), spec.student.widths(start)
        is_most = num_layers is None and spec.student.made_by is not None  # a search makes none that is deeper
        num_layers = start.num_layers if is_most else num_layers
        sizes = Sizes(num_layers, widths, start.embedding_rows or start.vocab_size, may_be_shallower=is_most)
        for stage in self.earlier(spec):
            if isinstance(stage, ModelStage) and stage.role in self.roles(spec):
                sizes = stage.resize(sizes)
        return sizes

    def undivided(self, spec: "JobSpec", start: ModelFacts) -> int | None:
        """Returns the inputs of a matrix that its groups do not divide, as far as it is known how wide it is."""
        return self.sizes_before(spec, start).undivided(self.group_size)

    def keeps_grids(self, spec: "JobSpec") -> bool:  # noqa: ARG002 - most stages do not
        """Returns whether weights that are on grids stay there."""
        return False

    def starts_from_base(self, spec: "JobSpec") -> bool:
        """Returns whether its model is a student that starts from another model than the teacher."""
        return self.role == "student" and spec.student.source() is not None

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:
        """Returns whether it would take weights off the grids that they start on."""
        if not start.grid_bits or self.keeps_grids(spec):
            return []
        what = "the student starts from a quantised model"
        if not self.starts_from_base(spec):
            what = "the teacher is quantised"
            if self.trains or is_trained(self, spec, self.roles(spec)):
                return []
        why = f"{what}, and '{self.kind}' takes weights off their grids; "
        return [Problem("kind", f"{why}name the model as it was before 'quantize', or leave this stage out")]

    def check_depths(self, spec: "JobSpec", depths: Depths) -> list[Problem]:  # noqa: ARG002 - most need not know
        """Returns what is wrong with these settings for models of so many layers; fields as of `check`."""
        return []

    def advise(self, spec: "JobSpec") -> list[Problem]:
        """Returns whether nothing brings back what is forgotten."""
        if not self.forgets or any(s.trains and self.role in s.writes() for s in self.later(spec).values()):
            return []
        return [
            Problem("kind", f"nothing trains the {self.role} after it; a 'distill' stage brings back what it loses")
        ]


def is_trained(stage: Stage, spec: "JobSpec", roles: set[str]) -> bool:
    """Returns whether one of these roles is trained before a stage."""
    return any(other.trains and roles & other.writes() for other in stage.earlier(spec))


def find_change(stage: Stage, spec: "JobSpec", made: set[str], of: set[str]) -> str | None:
    """Returns the last later stage that makes one of the roles `of` anew, for a message.

    None if there is none, or all that this stage has `made` of these is made again after it.
    """
    later = stage.later(spec)
    last = max((number for number, other in later.items() if of & other.writes()), default=None)
    if last is None:
        return None
    again = {role for number, other in later.items() if number > last for role in other.writes()}
    return None if made <= again else f"stage {last}, '{later[last].kind}',"
