"""The only reader of the environment."""

import math
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Process settings, each from the variable `STILLHOUSE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="STILLHOUSE_", frozen=True)

    database_url: str = Field(
        "postgresql+psycopg://localhost/stillhouse", description="SQLAlchemy URL of the Postgres database."
    )
    redis_url: str = Field("redis://localhost:6379/0", description="Celery broker; it carries only hints.")
    storage_dir: Path = Field(
        Path("var/blobs"),
        description="Folder of the content-addressed store; with a bucket, of what is being written and at hand.",
    )
    s3_url: str | None = Field(
        None,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._/-]*)?$",
        description="`s3://bucket/prefix` keeps the store in a bucket. Keys and region come from the usual `AWS_…` "
        "variables, or from the machine's role.",
    )
    s3_endpoint: str | None = Field(
        None, pattern="^https?://", description="Address of a server that speaks S3's protocol; without it, Amazon's."
    )
    s3_redirects: bool = Field(
        True, description="Downloads are redirected to signed addresses of the bucket; else they go through the API."
    )
    s3_public_endpoint: str | None = Field(
        None, pattern="^https?://", description="Where clients reach the bucket, if elsewhere than API and workers."
    )
    s3_url_s: int = Field(
        3600, ge=1, le=7 * 24 * 3600, description="How long signed addresses hold, at most `collect_after_s`."
    )
    s3_at_hand_bytes: int = Field(
        50 * 1024**3, ge=0, description="How much of the bucket each machine keeps at hand in its folder."
    )
    s3_retry_s: int = Field(120, ge=0, description="How long a bucket that is away is waited for.")
    staging_dir: Path = Field(Path("var/staging"), description="Scratch folder of a worker's running stages.")
    hub_endpoint: str = Field("https://huggingface.co", description="Where `hub:org/name` models are fetched from.")
    hub_token: str | None = Field(None, description="Token for the hub, if it needs one.")
    queues: str = Field("cpu", description="Comma-separated queues that this worker serves.")
    secret_key: str | None = Field(
        None,
        description="Fernet key under which tenants' secrets are stored; several, with commas, to change it: the first "
        "encrypts, each decrypts.",
    )
    teacher_hosts: str = Field(
        "api.openai.com",
        description="Comma-separated `host` or `host:port` of the teachers' APIs that workers may ask; `*` is any.",
    )
    keep_answers_s: int = Field(
        90 * 24 * 3600, ge=0, description="How long the answers of teachers' APIs are kept, so that none is paid twice."
    )
    num_threads: int = Field(0, ge=0, description="Threads of a stage's child process; 0 means all cores.")
    num_processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that train a model together, or answer for it, each on a GPU of its own where there are "
        "GPUs; they share the threads.",
    )
    shard_layers: bool = Field(
        False,
        description="Processes that work together split the layers of teacher and student among them: for models that "
        "do not fit on one GPU. Slower where they do.",
    )
    max_child_memory_bytes: int = Field(0, ge=0, description="Address-space limit of a child; 0 means none.")
    lease_s: int = Field(60, ge=2, description="How long a claim holds without a heartbeat.")
    heartbeat_s: float = Field(10.0, gt=0, description="Pause between two heartbeats of a supervisor.")
    hung_s: int = Field(900, ge=5, description="A child silent for this long is killed and the stage retried.")
    stop_grace_s: float = Field(
        100.0, gt=0, description="How long a child has to write a checkpoint and end once it is told to stop."
    )
    poll_s: float = Field(10.0, gt=0, description="How often an idle worker looks at the table without a hint.")
    reconcile_s: float = Field(5.0, gt=0, description="Pause between two ticks of the reconciler.")
    hint_after_s: int = Field(30, ge=1, description="A queued job without a hint for this long is hinted again.")
    max_attempts: int = Field(5, ge=1, description="Workers lost in a row before the job fails as `worker_lost`.")
    checkpoint_s: float = Field(
        60.0,
        ge=0,
        description="Shortest pause between two checkpoints; it grows until they cost under 3 %. With 0 there is one "
        "after every step.",
    )
    keep_checkpoints_s: int = Field(
        7 * 24 * 3600, ge=0, description="How long the checkpoints of a job that failed or was cancelled are kept."
    )
    collect_after_s: int = Field(
        3600, ge=1, description="Stored bytes that nothing refers to are deleted once they are this old."
    )
    collect_every_s: float = Field(
        300.0, gt=0, description="Shortest pause between two collections of such bytes, by whichever worker."
    )
    max_upload_bytes: int = Field(20 * 1024**3, description="Largest body of one upload.")
    max_rows: int = Field(5_000_000, description="Most rows in one split of a data set.")
    max_text_chars: int = Field(100_000, description="Longest text in a data set, in characters.")
    log_format: Literal["text", "json"] = Field(
        "text", description="`json` has a line be an object with the ids of request, tenant, job and stage."
    )
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="Where traces are sent, as `http://collector:4318`: a collector that takes OTLP over HTTP. Without "
        "it there are none.",
    )
    public_url: str = Field(
        "http://127.0.0.1:8500", description="Where clients reach this server, as other services are told."
    )
    webhook_hosts: str = Field(
        "",
        description="Hosts that webhooks may be sent to although they are not public, as 'ci.internal:8080,10.0.0.7', "
        "separated by commas.",
    )
    idempotency_ttl_s: int = Field(24 * 3600, description="How long an Idempotency-Key is remembered.")

    def may_ask(self, url: str) -> bool:
        """Tells whether workers may ask a teacher's API at that address."""
        address = urlsplit(url)
        host = (address.hostname or "").lower()
        allowed = {name.strip().lower() for name in self.teacher_hosts.split(",")}
        return bool(allowed & {"*", host, f"{host}:{address.port}"})

    @field_validator("heartbeat_s")
    @classmethod
    def _beats_in_time(cls, value: float, info: ValidationInfo) -> float:
        """Refuses a pause in which a lease could run out while its owner lives."""
        if value > info.data.get("lease_s", math.inf) / 2:
            raise ValueError("must be at most half of STILLHOUSE_LEASE_S, or each claim runs out under its owner")
        return value

    @property
    def queue_names(self) -> list[str]:
        """Names of the queues this worker serves."""
        return [name.strip() for name in self.queues.split(",") if name.strip()]


@cache
def get_settings() -> Settings:
    """Returns the settings of this process, read once."""
    return Settings()


def describe_errors(error: ValidationError) -> str:
    """Returns which variables cannot be used, and why; not what they hold, which may be secret."""
    found = (f"STILLHOUSE_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors())
    return f"A setting cannot be used. {'; '.join(found)}."


def describe() -> str:
    """Returns the page of all settings, in Markdown."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `STILLHOUSE_{name.upper()}` | {default} | {field.description} |")
    head = [
        "# Settings of API and workers",
        "",
        "From the environment. `stillhouse up` sets what the local stack needs.",
        "",
    ]
    return "\n".join([*head, "| variable | default | what it is |", "| --- | --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    print(describe(), end="")  # noqa: T201 - for docs/settings.md
