"""What the client's calls return: the server's JSON, typed. Fields that a newer server adds stay available."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from stillhouse.errors import JobFailed

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})


class Result(BaseModel):
    """One object of the server."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class File(Result):
    """One file of a model or of an artifact."""

    path: str
    sha256: str
    size_bytes: int


class Model(Result):
    """A stored model; lists leave `files` empty."""

    id: str
    name: str
    size_bytes: int
    facts: dict[str, Any]
    files: list[File] = []
    created_at: datetime


class Split(Result):
    """One split of a data set."""

    num_rows: int
    size_bytes: int
    columns: dict[str, str]
    text_column: str | None
    label_column: str | None
    label_counts: dict[str, int]


class Dataset(Result):
    """A stored data set and what its check found."""

    id: str
    name: str
    splits: dict[str, Split]
    report: dict[str, Any]
    created_at: datetime


class Preview(Result):
    """Some rows of a split."""

    data: list[dict[str, Any]]
    num_rows: int
    next_offset: int | None


class Method(Result):
    """One method that a spec can name."""

    family: str
    kind: str
    description: str
    defaults: dict[str, Any]
    required: list[str]
    json_schema: dict[str, Any]


class Validation(Result):
    """A good spec with its defaults, what its references mean, and what is worth knowing."""

    spec: dict[str, Any]
    spec_sha256: str
    inputs: dict[str, Any]
    student: dict[str, Any]
    vocabulary: str | None
    warnings: list[dict[str, Any]]


class Series(Result):
    """One metric of one stage; a point is a step and a value, null for one that is not finite."""

    name: str
    stage: str
    ordinal: int
    num_points: int
    points: list[tuple[int, float | None]]


class Stage(Result):
    """One stage of a job and how far it is."""

    kind: str
    ordinal: int
    state: str
    progress: float
    step: int
    total_steps: int
    eta_s: float | None
    settings: dict[str, Any]
    summary: dict[str, Any] | None
    cache_key: str | None = None
    reused: dict[str, Any] | None = None
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def status(self) -> str:
        """The state, and for a cached stage the job whose result it took over."""
        return f"{self.state}, from {self.reused['job_id']}" if self.reused else self.state


class Job(Result):
    """A job; lists leave `stages`, `spec` and `inputs` empty."""

    id: str
    name: str
    state: str
    metadata: dict[str, str]
    repo: str | None = None
    parent_id: str | None = None
    content_sha256: str | None = None
    envelope_sha256: str | None = None
    retries: int = 0
    error: dict[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    progress: float | None = None
    stages: list[Stage] = []

    @property
    def is_terminal(self) -> bool:
        """Tells whether the job's state will never change again."""
        return self.state in TERMINAL_STATES

    @property
    def failed_stage(self) -> Stage | None:
        """The stage that failed, if one did."""
        return next((stage for stage in self.stages if stage.state == "failed"), None)

    def failure(self) -> JobFailed:
        """Returns the exception that says why the job ended without success."""
        if self.error is None:
            return JobFailed(
                f"Job {self.id} was cancelled." if self.state == "cancelled" else f"{self.id} failed.", self
            )
        stage = self.failed_stage
        where = f" in stage {stage.ordinal} ({stage.kind})" if stage else ""
        message = str(self.error.get("message", "")).rstrip(".")
        remedy = f" {self.error['suggestion']}" if self.error.get("suggestion") else ""
        return JobFailed(f"Job {self.id} failed{where}: {self.error.get('reason')}: {message}.{remedy}", self)


class TeacherUsage(Result):
    """Answers and tokens that a job has paid for at the API of its teacher."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class Usage(Result):
    """For how many seconds workers have held a job, and what it has paid for."""

    seconds: float
    seconds_by_queue: dict[str, float]
    teacher: TeacherUsage


class Event(Result):
    """Something that happened to a job; `seq` counts from 1 without a gap."""

    seq: int
    type: str
    level: str
    message: str
    data: dict[str, Any]
    at: datetime


class Artifact(Result):
    """A published output of a job."""

    name: str
    size_bytes: int
    files: list[File]


class Key(Result):
    """An API key; `key` is its text, which only its creation shows."""

    id: str
    name: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    key: str | None = None


class Secret(Result):
    """A stored secret, without its value."""

    name: str
    changed_at: datetime


class Webhook(Result):
    """An address that is told of events; `secret` signs messages, and only creation and rotation show it."""

    id: str
    name: str
    url: str
    event_types: list[str]
    sink: dict[str, Any]
    is_enabled: bool
    created_at: datetime
    secret: str | None = None


class Delivery(Result):
    """A message to a webhook, and what became of each attempt to send it."""

    id: str
    type: str
    state: str
    job_id: str | None
    attempts: list[dict[str, Any]]
    created_at: datetime

    @property
    def outcome(self) -> str:
        """What the last attempt came to: a status, or why there was none."""
        last = self.attempts[-1] if self.attempts else {}
        return str(last.get("status") or last.get("error") or "")


class Point(Result):
    """A form of a student that a search of a job has trained and measured."""

    number: int
    form: str
    stage: int
    sizes: dict[str, int]
    retained: float
    size_bytes: int
    latency_p50_ms: float
    latency_p95_ms: float
    meets: bool
    on_front: bool
    files: dict[str, str] | None
