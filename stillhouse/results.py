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
    """A stored model."""

    id: str
    name: str
    files: list[File] = []
    created_at: datetime | None = None


class Dataset(Result):
    """A stored data set."""

    id: str
    name: str
    created_at: datetime | None = None


class Stage(Result):
    """One stage of a job and how far it is."""

    kind: str
    ordinal: int
    state: str
    step: int = 0
    total_steps: int = 0
    progress: float | None = None
    eta_s: float | None = None
    summary: dict[str, Any] | None = None

    @property
    def fraction(self) -> float:
        """How much of the stage is done, from 0 to 1."""
        if self.state in {"succeeded", "cached"}:
            return 1.0
        if self.progress is not None:
            return self.progress
        return self.step / self.total_steps if self.total_steps else 0.0


class Job(Result):
    """A job and its stages."""

    id: str
    name: str
    state: str
    stages: list[Stage] = []
    error: dict[str, Any] | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

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


class Event(Result):
    """Something that happened to a job; `seq` counts from 1 without a gap."""

    seq: int
    type: str
    level: str = "info"
    message: str
    data: dict[str, Any] = {}
    at: datetime | None = None


class Artifact(Result):
    """A published output of a job."""

    name: str
    files: list[File]


class Key(Result):
    """An API key; `key` is its text, which only its creation shows."""

    id: str
    name: str
    scopes: list[str] = []
    key: str | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
