"""The job spec: what a client posts."""

import hashlib
import json
import re
from collections.abc import Container
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from core.datasets.refs import DataSpec
from core.errors import MAX_DETAILS, SpecInvalid
from core.methods import SPLITS, ModelSource, Problem, Stage, Student, Task, Teacher
from core.registry import OneOf, list_families, list_methods
from core.strict import StrictModel, is_deeper, suggest
from core.target import Target

NEEDED = {
    "teacher": "a teacher that is a model of the task, and this one only answers; leave the stage out",
    "answers": "the answers of a teacher that only answers; add stage 'answer' before it",
}
MAX_STAGES = 32
MAX_DEPTH = 64
MAX_YAML_EVENTS = 20_000
M = TypeVar("M", bound=StrictModel)


def _complete(stage: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a stage with what is known of its kind, and of the stages that it runs inside."""
    kind = str(stage.get("kind"))
    field = "recover" if stage.get("steps", 1) != 1 else "distill" if kind == "search" else ""
    inside = stage.get(field, {})
    inner = {field: {**known["distill"], **inside}} if field and "distill" in known and isinstance(inside, dict) else {}
    return {**known.get(kind, {}), **stage, **inner}


def _default_stages(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec.get("target"):
        return [{"kind": "finetune"}, {"kind": "search", **spec["target"].model_dump()}, {"kind": "evaluate"}]
    return spec["task"].default_stages(spec["teacher"]) if spec.keys() >= {"task", "teacher"} else []


class JobSpec(StrictModel):
    """A job: a teacher, a student, data, and the stages that make one into the other."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema["required"].remove("student"))  # beside `target`

    name: str = Field("job", max_length=120, pattern=r"^[\w .:/-]+$", description="Your name for the job.")
    task: Annotated[Task, OneOf()] = Field(
        default={"kind": "text_classification"}, validate_default=True, description="What the model is to do."
    )
    target: Target | None = Field(
        None,
        exclude=True,
        description="What the student is to reach, in place of `student` and `stages`: a search finds the smallest one "
        "that does. It is a shorter way to write a stage `search`.",
    )
    teacher: Annotated[Teacher, OneOf(default="model")] = Field(description="Who to learn from; a model, or another.")
    student: Annotated[Student, OneOf()] = Field(description="Where it comes from; needed unless there is a `target`.")
    data: DataSpec = Field(description="The splits; a bare data set name means its train, validation and test.")
    stages: list[Annotated[Stage, OneOf()]] = Field(
        default_factory=lambda spec: _default_stages(spec),
        validate_default=True,
        min_length=1,
        max_length=MAX_STAGES,
        description="What to do, in order; left out, the teacher is fine-tuned and the student distilled, written in "
        "every form that its task has, and measured.",
    )
    cache: Literal["use", "refresh", "off"] = Field(
        "use",
        description="`use` takes over the result of an identical stage of yours; `refresh` runs every stage and offers "
        "its result to later jobs; `off` does neither.",
    )
    retries: int = Field(
        2,
        ge=0,
        le=20,
        description="How often a stage is tried again after a failure that may pass, as a full disk.",
    )
    max_seconds: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="The job fails as `budget_exhausted` once workers have held it for this long in all.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of every random choice.")
    deterministic: bool = Field(
        False,
        description="Whether a stage makes the same bytes each time on a GPU, too, as it always does on a processor; "
        "some steps are slower then.",
    )
    metadata: dict[str, str] = Field({}, description="Your own labels; jobs can be listed by them.", max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _from_target(cls, data: Any) -> Any:
        """Has the student searched for."""
        if not isinstance(data, dict) or data.get("target") is None:
            return data
        taken = [name for name in ("student", "stages") if name in data]
        if taken:
            why = "'{name}' says what to make, and 'target' has it searched for; leave one of them out"
            raise PydanticCustomError("target", why, {"name": taken[0]})
        return data | {"student": {"kind": "searched"}}

    @field_validator("metadata")
    @classmethod
    def _short(cls, value: dict[str, str]) -> dict[str, str]:
        if any(not 0 < len(key) <= 64 or len(text) > 512 or "\x00" in key + text for key, text in value.items()):
            raise PydanticCustomError(
                "metadata", "a key has 1 to 64 characters, a value at most 512, and neither holds a NUL", {}
            )
        if any(":" in key for key in value):
            raise PydanticCustomError("metadata", "a key holds no colon, after which a filter has the value", {})
        return value

    @field_validator("stages", mode="before")
    @classmethod
    def _fill_in(cls, value: Any, info: ValidationInfo) -> Any:
        """Adds what the task sets where a stage leaves it out."""
        known = info.data["task"].stage_defaults() if "task" in info.data else {}
        if not known or not isinstance(value, list):
            return value
        return [_complete(stage, known) if isinstance(stage, dict) else stage for stage in value]

    @field_validator("stages")
    @classmethod
    def _unfold(cls, value: list[Stage]) -> list[Stage]:
        """Has stages in steps be what they stand for, so that each step is cached, resumed and forked on its own."""
        unfolded = [part for stage in value for part in stage.unfold()]
        if len(unfolded) > MAX_STAGES:
            why = "with all steps there are {count} stages, and {most} are the most; choose fewer steps"
            raise PydanticCustomError("too_many_stages", why, {"count": len(unfolded), "most": MAX_STAGES})
        return unfolded

    def digest(self) -> str:
        """Returns the sha256 of the normalised spec."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def models(self) -> dict[str, ModelSource]:
        """Returns the models that the spec names, by the role in which a stage finds their files."""
        taught = {role: s._replace(field=f"teacher.{s.field}") for role, s in self.teacher.sources().items()}
        base = self.student.source()
        named = [(f"stages.{ordinal}.", stage.sources()) for ordinal, stage in enumerate(self.stages)]
        asked = {role: s._replace(field=start + s.field) for start, some in named for role, s in some.items()}
        return taught | ({} if base is None else {"base": ModelSource("student.model", base)}) | asked

    @property
    def starts_from(self) -> str:
        """The role of the model that the student is made of."""
        return "base" if self.student.source() else "teacher"

    def task_of(self, path: str) -> Task:
        """Returns the task of a split, by its path as of `DataSpec.refs`."""
        return self.task_named(path.partition("/")[2])

    def task_named(self, name: str | None) -> Task:
        """Returns one of several tasks, or the job's where there is no name."""
        return self.task.parts()[name] if name else self.task

    def scopes(self) -> "dict[str, JobSpec]":
        """Returns the spec, and as each stage has it that has a task and data of its own, by how their fields begin."""
        own = {self.scope_of(ordinal): self._within(stage) for ordinal, stage in enumerate(self.stages) if stage.own()}
        return {"": self} | own

    def scope_of(self, ordinal: int) -> str:
        """Returns how the fields begin of the task and data that a stage is about, its own or the job's."""
        return f"stages.{ordinal}." if self.stages[ordinal].own() else ""

    def _within(self, stage: Stage) -> "JobSpec":
        return self.model_copy(update=stage.own())

    def compares_tokens(self) -> bool:
        """Returns whether some stage needs teacher and student to have the same tokens."""
        return any(stage.compares_tokens(self) for stage in self.stages)

    def seen_by(self, stage: Stage) -> dict[str, Any]:
        """Returns the spec as one of its stages sees it, without what its result must not depend on.

        Names are no content: what they stand for is told to the stage by its bytes. A stage that makes no student
        does not see which one is to be made. One with a task and data of its own sees these in place of the job's. Only
        a stage that reports on the whole job sees all of its stages and the names.
        """
        within = self._within(stage)
        fields = within.model_dump(mode="json", exclude={"metadata", "cache", "retries", "max_seconds"})
        if not stage.reports_on_job:
            fields |= {
                "name": "job",
                "teacher": self._teacher_seen_by(stage),
                "student": self._student_seen_by(stage),
                "data": within.data.content(),
                "stages": [stage.content()],
            }
        return fields

    def _teacher_seen_by(self, stage: Stage) -> dict[str, Any]:
        asks = stage.asks_teacher and not self.teacher.is_model
        return self.teacher.content() if asks else {"kind": "model", "model": "teacher"}

    def _student_seen_by(self, stage: Stage) -> dict[str, Any]:
        if "student" not in stage.writes():
            return {"kind": "teacher_layers", "keep": [0]}
        return self.student.model_dump(mode="json") | ({"model": "base"} if self.student.source() else {})

    def check(self) -> list[Problem]:
        """Returns what is wrong between the parts of the spec: each stage must find what it reads."""
        problems = [
            Problem(start + p.field, p.message) for start, scope in self.scopes().items() for p in scope._check_tasks()
        ]
        problems += [Problem(f"teacher.{p.field}", p.message) for p in self.teacher.check(self)]
        roles = {"teacher"} if self.teacher.is_model else set()
        if not self.teacher.is_model and self.student.source() is None:
            why = f"a '{self.teacher.kind}' teacher only answers, so nothing of it can be kept; "
            why += "use kind 'pretrained', or 'teacher_layers' with the model whose layers to keep"
            problems.append(Problem("student.kind", why))
        problems += self._check_maker() + self._check_sharing()
        for index, stage in enumerate(self.stages):
            problems += [Problem(f"stages.{index}.{p.field}", p.message) for p in stage.check(self)]
            for role in sorted(stage.reads(self) - roles):
                why = (
                    f"stage '{stage.kind}' needs {NEEDED.get(role, f'a {role}; add a stage that makes one before it')}"
                )
                problems.append(Problem(f"stages.{index}", why))
            roles |= stage.writes()
        return problems

    def _check_maker(self) -> list[Problem]:
        """Returns whether another stage makes the student than the one that can."""
        wanted = self.student.made_by
        makers = [(n, stage) for n, stage in enumerate(self.stages) if "student" in stage.writes()]
        if wanted and (not makers or makers[0][1].kind != wanted):
            why = f"a '{self.student.kind}' student comes from a stage '{wanted}'; put it before those that use one"
            return [Problem("student.kind", why)]
        why = "'{}' finds the student, once; write student: {{kind: searched}}"
        return [
            Problem(f"stages.{number}", why.format(stage.kind))
            for place, (number, stage) in enumerate(makers)
            if stage.makes_student and (stage.kind != wanted or place > 0)
        ]

    def _check_sharing(self) -> list[Problem]:
        """Returns why tasks that are to have layers of their own get none."""
        if self.task.shared_layers is None:
            return []
        if self.student.reuses_layers():
            why = f"layers of a '{self.student.kind}' student are the same, so none is a task's own; use 'all'"
            return [Problem("task.shared", why)]
        if any(stage.keeps_apart(self) for stage in self.stages):
            return []
        why = "tasks have layers of their own in the student alone, and no stage trains it; add one, or use 'all'"
        return [Problem("task.shared", why)]

    def _check_tasks(self) -> list[Problem]:
        """Returns which tasks have no split, and which splits no task."""
        problems, tasks = [], self.task.parts().keys()
        for split in SPLITS:
            refs = getattr(self.data, split)
            named = refs.keys() if isinstance(refs, dict) else set()
            if refs is None or named == tasks:
                continue
            if not tasks:
                why = f"a {self.task.kind} has one task, so one split; write 'dataset/split'"
            elif named - tasks:
                why = f"there is no task '{min(named - tasks)}'; {suggest(min(named - tasks), tasks)}"
            else:
                why = (
                    f"the task '{min(tasks - named)}' has no split here; name one for each: {', '.join(sorted(tasks))}"
                )
            problems.append(Problem(f"data.{split}", why))
        return problems


class _SpecLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with the plain values of YAML 1.2, read in C where the library has it.

    There `1e-4` is a number, and `no`, `2:4` and `2026-01-01` are text. Source: YAML 1.2.2, section 10.3.2.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
):
    _SpecLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
# what PyYAML's constructors let through for odd scalars such as `!!int ''` or an impossible date
_CONSTRUCTOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def _parse_yaml(text: str) -> Any:
    """Looks at the events first: aliases, deep nesting and masses of nodes make a small body expensive."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_SpecLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not accepted; write the value out")
        if depth > MAX_DEPTH or count > MAX_YAML_EVENTS:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels or {MAX_YAML_EVENTS:,} values; no spec needs that")
    return yaml.load(text, Loader=_SpecLoader)  # noqa: S506 (a SafeLoader)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None  # flow-style YAML starts with a brace, too


def parse_spec(body: bytes) -> JobSpec:
    """Returns the spec in a JSON or YAML body. Raises SpecInvalid with every problem and its field."""
    return load_spec(parse_mapping(body, "teacher, student and data"))


def parse_mapping(body: bytes, fields: str) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML body; `fields` tells a client what it should hold. Raises SpecInvalid."""
    try:
        text = body.decode("utf-8-sig")
        data = _parse_json(text) if text.lstrip().startswith("{") else None
        if data is None:
            data = _parse_yaml(text)
        json.dumps(data, default=str, ensure_ascii=False).encode()  # JSON can escape surrogates, which no text may hold
    except (yaml.YAMLError, RecursionError, *_CONSTRUCTOR_ERRORS) as error:
        raise SpecInvalid(f"The body is neither valid YAML nor JSON: {error}") from error
    if not isinstance(data, dict):
        raise SpecInvalid(f"The body must be a mapping with {fields}.")
    if is_deeper(data, MAX_DEPTH):  # what recurses over a spec later relies on it
        raise SpecInvalid(f"The body has more than {MAX_DEPTH} levels; no spec needs that.")
    field = _find_nul(data)
    if field is not None:  # which no text of a database may hold
        raise spec_invalid([{"field": field, "message": "holds a NUL character; leave it out"}])
    return data


def _find_nul(node: Any, field: str = "") -> str | None:
    """Returns the field of a text with a NUL, or of the key that has one."""
    if isinstance(node, str):
        return field if "\0" in node else None
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        inner = f"{field}.{key}" if field else str(key)
        found = field if "\0" in str(key) else _find_nul(child, inner)
        if found is not None:
            return found
    return None


def load_spec(data: dict[str, Any]) -> JobSpec:
    """Returns the spec in parsed data. Raises SpecInvalid with every problem and its field."""
    spec = validate(JobSpec, data)
    problems = spec.check()
    if problems:
        raise spec_invalid([{"field": p.field, "message": p.message} for p in problems])
    return spec


def validate(model: type[M], data: dict[str, Any]) -> M:
    """Returns parsed data as a model. Raises SpecInvalid with every problem and its field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [one for one in error.errors(include_url=False) if one["type"] != "default_factory_not_called"]
        tags = {kind for family in list_families() for kind in list_methods(family)}
        raise spec_invalid([_detail(one, tags) for one in problems[:MAX_DETAILS]], len(problems)) from error


def spec_invalid(details: list[dict[str, Any]], num_problems: int | None = None) -> SpecInvalid:
    """Returns the error for a list of `{field, message}`, or the first of so many; its message shows the first."""
    first, num_others = details[0], (num_problems or len(details)) - 1
    more = f" (and {num_others} more)" if num_others else ""
    where = f"{first['field']}: " if first["field"] else ""
    return SpecInvalid(f"{where}{first['message']}{more}", param=first["field"] or None, details=details[:MAX_DETAILS])


def _detail(error: ErrorDetails, tags: Container[str]) -> dict[str, Any]:
    context = error.get("ctx") or {}
    parts: list[int | str] = []
    is_tag = False
    for part in error["loc"]:  # pydantic adds the chosen kind to the path; a field after it may be called the same
        is_tag = part in tags and not is_tag
        parts += [] if is_tag else [part]
    if error["type"] == "unknown_field":
        parts.append(context["field"])
    if error["type"] in {"unknown_kind", "missing_kind"}:
        parts.append("kind")
    detail: dict[str, Any] = {"field": ".".join(str(part) for part in parts), "message": error["msg"]}
    found = error.get("input")
    if isinstance(found, str | int | float | bool) and error["type"] != "unknown_field":
        detail["found"] = str(found)[:200]
    return detail
