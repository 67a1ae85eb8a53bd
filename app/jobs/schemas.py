"""What the job operations answer."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.jobs.state import JobState, StageState
from core.models.facts import ModelFacts
from core.models.vocabulary import Relation
from core.storage import ManifestFile

CancelMode = Literal["now", "after_checkpoint"]


class Problem(BaseModel):
    """Something worth knowing about a field of the spec."""

    field: str
    message: str


class StageRef(BaseModel):
    """A stage of some job."""

    job_id: str = Field(examples=["job_0197f0c2a1b37cc0a1b2c3d4e5f60718"])
    ordinal: int


class StageView(BaseModel):
    """One stage of a job."""

    ordinal: int
    kind: str = Field(examples=["distill"])
    state: StageState = Field(description="`cached` is done, too, with the result of the stage that `reused` names.")
    progress: float = Field(description="Share that is done, 0 to 1.")
    step: int
    total_steps: int
    eta_s: float | None = Field(description="Seconds to the stage's end, as far as one can tell.")
    attempt: int
    settings: dict[str, Any]
    summary: dict[str, Any] | None = Field(description="What the stage measured, once it has ended well.")
    cache_key: str | None = Field(
        description="Stages of yours with the same key make the same bytes. Null: not yet known, or not offered.",
        examples=[None],
    )
    reused: StageRef | None = Field(description="The stage that made what a cached stage took over.")
    log_url: str | None = Field(description="Where the stage's log can be downloaded.")
    started_at: datetime | None
    finished_at: datetime | None


class JobSummary(BaseModel):
    """A job without its stages and spec."""

    id: str = Field(examples=["job_0197f0c2a1b37cc0a1b2c3d4e5f60718"])
    name: str
    state: JobState
    metadata: dict[str, str]
    queue: str
    repo: str = Field(
        description="What `huggingface_hub` and `transformers` call what it makes, with `HF_ENDPOINT=<server>/hub`.",
        examples=["acme/support-tickets-0197f0c2a1b37cc0a1b2c3d4e5f60718"],
    )
    parent_id: str | None = Field(description="The job that this one retries or forks.", examples=[None])
    content_sha256: str | None = Field(
        description="Names what a succeeded job made, but for measured times; no interruption changes it.",
        examples=["5e0c2a3f1d2b4c6e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f6"],
    )
    error: dict[str, Any] | None = Field(description="After a failure: reason, message, suggestion, stage, retryable.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobView(JobSummary):
    """A job: its spec, what the spec's references mean, and its stages."""

    spec: dict[str, Any] = Field(description="The spec as accepted, defaults filled in.")
    inputs: dict[str, Any] = Field(description="What the references were resolved to.")
    progress: float = Field(description="Share of all stages that is done, 0 to 1.")
    retries: int = Field(description="How often a stage was tried again by itself; the spec's `retries` is the most.")
    envelope_sha256: str | None = Field(
        description="Names what a succeeded job made and how: all bytes, the stages' times and attempts.",
        examples=["0718293a4b5c6d7e8f90a1b2c3d4e5f65e0c2a3f1d2b4c6e8f90a1b2c3d4e5f6"],
    )
    stages: list[StageView]


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    data: list[JobSummary]
    next_cursor: str | None


class TeacherUsage(BaseModel):
    """Answers and tokens that a job has paid for; what another job had asked before costs nothing."""

    model_config = ConfigDict(from_attributes=True)

    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageView(BaseModel):
    """For how long workers have held a job, as booked at their last heartbeat; what is taken over costs nothing."""

    seconds: float = Field(description="In all.", examples=[83.5])
    seconds_by_queue: dict[str, float] = Field(examples=[{"cpu": 83.5}])
    teacher: TeacherUsage = Field(description="What was paid for at the API of a teacher that is behind one.")


class ExpectedStudent(BaseModel):
    """How large the student will be, as far as the files tell before it is made."""

    num_parameters: int | None = Field(
        description="With the head that the files have; that of a new task is another. Null: not known, as of a fresh "
        "or narrower student of an architecture whose tensors the server does not know by name, or after a stage whose "
        "result depends on the data, as 'trim_vocabulary', or where tasks have layers of their own.",
        examples=[17_600_000],
    )
    size_bytes: dict[str, int] = Field(
        description="About what each form that the spec exports takes.", examples=[{"safetensors": 70_400_000}]
    )


class ValidatedSpec(BaseModel):
    """A good spec: with its defaults, what its references mean, and what is worth knowing."""

    spec: dict[str, Any]
    spec_sha256: str
    inputs: dict[str, Any]
    models: dict[str, ModelFacts] = Field(
        description="By role: the teacher, as `base` the model that the student starts from, if that is another, and "
        "as `alone_1` and so on those that it is compared with."
    )
    student: ExpectedStudent
    vocabulary: Relation | None = Field(
        description="Whether the student that is named has the teacher's tokens: `identical`; `padded`, where one has "
        "further ones, or logits that no token has, which are left out; `different`, and only a loss as 'uld' compares "
        "them. Null: not known, as of a hub's model, or not what the task's models choose among."
    )
    warnings: list[Problem]


class EventView(BaseModel):
    """Something that happened to a job."""

    seq: int = Field(description="Counts from 1 without a gap.")
    type: str = Field(examples=["stage.succeeded"])
    level: str
    message: str
    data: dict[str, Any]
    at: datetime


class EventPage(BaseModel):
    """A page of events, oldest first; ask for the next with `after` = the last `seq`."""

    data: list[EventView]
    next_cursor: str | None


class Series(BaseModel):
    """One metric of one stage."""

    name: str = Field(examples=["train/loss"])
    stage: str
    ordinal: int
    num_points: int = Field(description="Points before down-sampling.")
    points: list[tuple[int, float | None]] = Field(description="Pairs of step and value; null is NaN or infinity.")


class SeriesList(BaseModel):
    """Metric series."""

    data: list[Series]


class ArtifactView(BaseModel):
    """A published output of a job."""

    name: str = Field(examples=["onnx_int8"])
    stage: str
    ordinal: int
    sha256: str = Field(description="Digest of the list of files.")
    size_bytes: int
    files: list[ManifestFile]
    created_at: datetime


class ArtifactList(BaseModel):
    """A job's artifacts, in the order in which they were made."""

    data: list[ArtifactView]


class ResultView(BaseModel):
    """What a job has measured of its models."""

    model_config = ConfigDict(from_attributes=True)

    job_id: str = Field(examples=["job_0197f0c2a1b37cc0a1b2c3d4e5f60718"])
    name: str = Field(description="The job's.", examples=["support-tickets"])
    test: str | dict[str, str] = Field(
        description="The split that they were measured on, or of several tasks one each.", examples=["tickets/test"]
    )
    models: list[dict[str, Any]] = Field(
        description="Of teacher, student and each form its `name`, scores, `size_bytes`, `num_parameters` and times, "
        "as in the summary of the stage.",
        examples=[[{"name": "onnx_int8", "accuracy": 0.93, "size_bytes": 4_600_000, "latency_p95_ms": 1.8}]],
    )
    measured_at: datetime


class ResultPage(BaseModel):
    """A page of results."""

    data: list[ResultView]
    next_cursor: str | None


class FileRef(BaseModel):
    """A folder inside a job's artifact."""

    artifact: str = Field(examples=["points"])
    path: str = Field(examples=["3/onnx_int8/"])


class PointView(BaseModel):
    """A form of a student that a search has trained and measured."""

    number: int = Field(description="Of the student; counts from 1, in the order in which they were trained.")
    form: str = Field(examples=["onnx_int8"])
    stage: int = Field(description="The ordinal of the stage that searched.")
    sizes: dict[str, int] = Field(examples=[{"num_layers": 2, "intermediate_size": 768, "hidden_size": 384}])
    num_tokens: int
    num_parameters: int
    score: float = Field(description="On the validation split, of the form itself.")
    retained: float = Field(description="Its share of the teacher's score.")
    size_bytes: int = Field(description="All files of the form.")
    latency_p50_ms: float
    latency_p95_ms: float
    meets: bool = Field(description="Whether it meets the goal.")
    on_front: bool = Field(description="Whether no other is at least as good in all of quality, bytes and time.")
    seconds: float = Field(description="What it took to train and measure.")
    files: FileRef | None = Field(description="Where its form is, once the stage has ended.")


class PointList(BaseModel):
    """What the searches of a job have measured so far."""

    data: list[PointView]
