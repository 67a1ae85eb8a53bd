"""The families of methods: what each method of a family must be able to say and do."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from core.datasets.reading import RowProblem as RowProblem
from core.models.facts import Depths as Depths
from core.models.facts import ModelFacts as ModelFacts
from core.models.refs import ModelRef as ModelRef
from core.models.refs import ModelSource as ModelSource
from core.models.widths import Widths as Widths
from core.registry import Method, list_methods
from core.weights import Weight

if TYPE_CHECKING:
    from core.jobs.spec import JobSpec

SPLITS = ("train", "validation", "test")
ONNX_FORMS = ("onnx", "onnx_fp16", "onnx_int8", "onnx_int8_static", "onnx_int4")
UNTRACED = ("fnet", "funnel", "longformer", "tapas")  # encoders that no graph of ONNX says the same as
ENCODER_FORMS = ("safetensors", *ONNX_FORMS, "openvino", "executorch", "triton", "kserve", "compressed_tensors")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec: where, and what to do."""

    field: str
    message: str


class Task(Method):
    """What the model is to do, and which columns of the data say so.

    `forms` names the exporters for its models, and `graph_types` the architectures that have those which are graphs,
    all if there are none; `shares_tokens` says whether tokens are what teacher and student choose
    among, and `gives_values` whether its models give numbers, where others give probabilities. `label_loss` is what is
    learned from labels alone, and `shares_trunk` says whether its models can share all but the head with others.
    """

    family: ClassVar[str] = "tasks"
    forms: ClassVar[tuple[str, ...]] = ("safetensors",)
    graph_types: ClassVar[tuple[str, ...]] = ()
    shares_tokens: ClassVar[bool] = False
    gives_values: ClassVar[bool] = False
    min_labels: ClassVar[int] = 0
    label_loss: ClassVar[str] = "cross_entropy"
    shares_trunk: ClassVar[bool] = False

    def parts(self) -> "dict[str, Task]":
        """Returns the tasks that it is made of, by name; most are made of none."""
        return {}

    @property
    def reads_texts(self) -> bool:
        """Whether an example is a text or two, out of which words can be left."""
        return "text" in self.columns() and not self.shares_tokens

    @property
    def adapts_each(self) -> bool:
        """Whether these tasks share what is frozen alone, each with an adapter of its own."""
        return False

    @property
    def shared_layers(self) -> int | None:
        """How many first layers of a student these tasks share, each having the others alone; None for all of them."""
        return None

    @property
    def has_own_weights(self) -> bool:
        """Whether each of these tasks has more of its own than a head: an adapter, or layers."""
        return self.adapts_each or self.shared_layers is not None

    @property
    def learns_balance(self) -> bool:
        """Whether it is learned how much each of these tasks counts."""
        return False

    def stage_defaults(self) -> dict[str, dict[str, Any]]:
        """Returns, by the kind of a stage, settings that a spec may leave out."""
        return {}

    def columns(self) -> dict[str, str]:
        """Returns the columns the data must have, by their role (`text`, `label`)."""
        raise NotImplementedError

    def read_labels(self, row: dict[str, Any]) -> "tuple[list[RowProblem], list[str]]":  # noqa: ARG002
        """Returns what is wrong with a row, and the labels that it names; a job's labels are those of its rows."""
        return [], []

    def default_stages(self, teacher: "Teacher") -> list[dict[str, Any]]:
        """Returns the stages of a spec that names none."""
        return [
            *teacher.default_stages(self),
            {"kind": "export", "formats": [{"kind": kind} for kind in self._default_forms()]},
            {"kind": "evaluate"},
        ]

    def _default_forms(self) -> list[str]:
        """Returns the forms that a job writes unless it says so."""
        known = list_methods("exporters")
        return [kind for kind in self.forms if known[kind].is_default]  # type: ignore[attr-defined]

    def build(self, ctx: Any) -> Any:
        """Returns what a stage does for this task (torch), a `worker.engine.tasks.TaskRun`."""
        raise NotImplementedError


class Api(NamedTuple):
    """Where a teacher's API is, and the name of the stored secret that holds its key, if it needs one."""

    base_url: str
    secret: str | None


class Teacher(Method):
    """Who the student learns from; `model` is what it is called, whatever kind of teacher it is.

    `is_model` says whether it is a model of the job's task, which can be trained, cut down to a student, and run and
    measured beside it. Any other only answers: an `answer` stage keeps what it says, and the student hears that.
    """

    family: ClassVar[str] = "teachers"
    is_model: ClassVar[bool] = False

    model: str

    def sources(self) -> dict[str, ModelSource]:
        """Returns the models that it is made of, by the role that their files have; fields relative to the teacher."""
        return {}

    def api(self) -> Api | None:
        """Returns the API that is to be asked, if it is behind one."""
        return None

    def default_stages(self, task: Task) -> list[dict[str, Any]]:  # noqa: ARG002 - few look at the task
        """Returns the first stages of a spec that names none: a model is fine-tuned, another teacher asked."""
        asked = {"kind": "answer", "splits": [*SPLITS]}
        return [{"kind": "finetune", "of": "teacher"} if self.is_model else asked, {"kind": "distill"}]

    def content(self) -> dict[str, Any]:
        """Returns the settings on which its answers depend; what a name of files stands for is told by their bytes."""
        return self.model_dump(mode="json") | ({"model": "teacher"} if self.sources() else {})

    def check(self, spec: "JobSpec") -> list[Problem]:  # noqa: ARG002 - most teachers have nothing to check
        """Returns what is wrong with these settings inside that spec; fields are relative to the teacher."""
        return []

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(examples, max_length) -> scores_NC` (torch): logits of the job's labels for each one."""
        raise NotImplementedError


class Student(Method):
    """Where the student's architecture and first weights come from.

    One that starts from another model than the teacher names it in a field `model`; its files have the role `base`.
    """

    family: ClassVar[str] = "students"
    made_by: ClassVar[str | None] = None  # the kind of stage that alone can make it
    begins_at_random: ClassVar[bool] = False

    @property
    def asks_head(self) -> bool:
        """Whether what it keeps is told by how well what it is made of does the job's task."""
        return False

    def source(self) -> str | None:
        """Returns the reference of the model that it starts from, None for the teacher."""
        return None

    def check(self, start: ModelFacts) -> list[Problem]:
        """Returns what makes this student impossible, made of that model: its source, or the teacher."""
        raise NotImplementedError

    def reuses_layers(self, start: ModelFacts | None = None) -> bool:
        """Returns whether layers have the same weights, made of that model; without it whether they are to."""
        return start is not None and start.reuses_layers

    def count_layers(self, start: ModelFacts) -> int | None:
        """Returns how many layers it will have, made of that model; None if unknown."""
        return start.num_layers

    def widths(self, start: ModelFacts) -> Widths | None:
        """Returns how wide it will be, made of that model; None if unknown."""
        return start.widths

    def count_parameters(self, start: ModelFacts) -> int | None:  # noqa: ARG002 - not every kind can tell
        """Returns how many parameters it will have, made of that model, without a new head; None if unknown."""
        return None

    def build(self, ctx: Any) -> Any:
        """Returns the student model (torch); `ctx` is a `worker.engine.context.StageContext`."""
        raise NotImplementedError


class Loss(Method):
    """One term of the training objective."""

    family: ClassVar[str] = "losses"
    needs_logits: ClassVar[bool] = False  # of the teacher, where distributions are not enough
    compares: ClassVar[Literal["probabilities", "values", "both"]] = "probabilities"  # what the task's models give
    is_of_labels: ClassVar[bool] = False  # and does not hear the teacher
    needs_same_tokens: ClassVar[bool] = True  # of a language model and its teacher
    needs_own_texts: ClassVar[bool] = False  # that the student writes
    is_linear: ClassVar[bool] = False  # in the teacher's probabilities, but for their entropy

    weight: Weight = 1.0

    def build(self, ctx: Any) -> Any:
        """Returns a callable `(student_logits_NC, signal, labels_N) -> loss_N` (torch).

        `signal` is a `worker.kernels.signals.Signal`: what the teacher says of the same rows.
        """
        raise NotImplementedError


class Exporter(Method):
    """One deployable form of the student; `bytes_per_parameter` is about what it takes to store one.

    `model_types` are the architectures that it is known for, all but `lacking_types` if there are none; `is_default`: a
    job writes it unless it says so; `is_measured`: a stage can run it; `calibrates`: it looks at the training split;
    `has_no_codes`: it stores weights that are on grids as it does all others.
    """

    family: ClassVar[str] = "exporters"
    bytes_per_parameter: ClassVar[float]
    model_types: ClassVar[tuple[str, ...]] = ()
    lacking_types: ClassVar[tuple[str, ...]] = ()
    is_default: ClassVar[bool] = True
    is_measured: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False
    has_no_codes: ClassVar[bool] = False
    is_graph: ClassVar[bool] = False  # that servers of ONNX run
    holds_each_task: ClassVar[bool] = False  # as a model of its own

    def check(self, earlier: "list[Stage]", base: ModelFacts | None) -> list[str]:  # noqa: ARG002 - most take any
        """Returns what is missing in the stages before the one that writes it, and in another model to start from."""
        return []

    def build(self, ctx: Any) -> Any:
        """Returns a callable that writes and checks the form."""
        raise NotImplementedError


class Stage(Method):
    """One step of a job."""

    family: ClassVar[str] = "stages"
    queue: ClassVar[str] = "cpu"
    reports_on_job: ClassVar[bool] = False
    resizes: ClassVar[bool] = False  # the model, to parameters that only the stage can count
    trains: ClassVar[bool] = False
    asks_teacher: ClassVar[bool] = False  # and keeps what it says
    makes_student: ClassVar[bool] = False  # of a kind that it alone can make

    def check(self, spec: "JobSpec") -> list[Problem]:  # noqa: ARG002 - most stages have nothing to check
        """Returns what is wrong with these settings inside that spec; fields are relative to the stage."""
        return []

    def advise(self, spec: "JobSpec") -> list[Problem]:  # noqa: ARG002 - most stages have no advice
        """Returns what is allowed in that spec, and seldom meant; fields as of `check`."""
        return []

    def earlier(self, spec: "JobSpec") -> "list[Stage]":
        """Returns the stages of its spec that come before this one."""
        return spec.stages[: next(ordinal for ordinal, stage in enumerate(spec.stages) if stage is self)]

    def later(self, spec: "JobSpec") -> "dict[int, Stage]":
        """Returns the stages of its spec that come after this one, by their ordinals."""
        own = next(ordinal for ordinal, stage in enumerate(spec.stages) if stage is self)
        return {ordinal: stage for ordinal, stage in enumerate(spec.stages) if ordinal > own}

    def check_model(self, spec: "JobSpec", start: ModelFacts) -> list[Problem]:  # noqa: ARG002 - most stages take any
        """Returns what is wrong with these settings for a student that starts from that model; fields as of `check`."""
        return []

    def reads(self, spec: "JobSpec") -> set[str]:
        """Returns the roles (`teacher`, `student`) that must exist before this stage of that spec."""
        raise NotImplementedError

    def writes(self) -> set[str]:
        """Returns the roles that this stage makes; each becomes an artifact of that name."""
        raise NotImplementedError

    def shares_work(self, spec: "JobSpec") -> bool:  # noqa: ARG002 - most stages are run by one process
        """Returns whether several processes can run it together."""
        return False

    def fixes_weights(self) -> bool:
        """Returns whether it leaves single weights at values that training must keep or choose anew."""
        return False

    def keeps_apart(self, spec: "JobSpec") -> bool:  # noqa: ARG002 - most stages do not
        """Returns whether what it trains is stored apart: with adapters, or each task's layers, beside the model."""
        return False

    def sources(self) -> dict[str, ModelSource]:
        """Returns the models that only stages which name them are given, by their files' role; fields as of `check`."""
        return {}

    def own(self) -> dict[str, Any]:
        """Returns the parts of the spec, `task` and `data`, that it has itself; most stages are about the job's."""
        return {}

    def content(self) -> dict[str, Any]:
        """Returns the settings on which its result depends; what a name of data stands for is told by its bytes."""
        return self.model_dump(mode="json")

    def compares_tokens(self, spec: "JobSpec") -> bool:  # noqa: ARG002 - most stages do not
        """Returns whether it compares what teacher and student say of each token, which must be the same."""
        return False

    def calibrates(self) -> list[str]:
        """Returns the kinds of what it does by a look at the training split."""
        return [form.kind for form in self.forms() if form.calibrates]

    def unfold(self) -> "list[Stage]":
        """Returns the stages that a spec with this one has in its place; most stand for themselves."""
        return [self]

    def forms(self) -> list[Exporter]:
        """Returns the forms of the student that this stage writes."""
        return []

    def measures(self) -> set[str]:
        """Returns those of the roles whose bytes hold times, so that no two runs make the same ones."""
        return set()

    def build(self, ctx: Any) -> Any:
        """Returns a callable without arguments that runs the stage; `ctx` is a `worker.engine.context.StageContext`."""
        raise NotImplementedError
