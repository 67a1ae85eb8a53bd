"""MLflow."""

import json
import math
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, ClassVar, Literal
from urllib.parse import urlencode, urlsplit, urlunsplit

from pydantic import Field

from core.repos.naming import repo_name
from core.settings import get_settings
from core.sinks.facts import JobFacts
from core.sinks.sink import Message, Sink
from core.webhooks.guard import Answer, request

ENDS = {"job.succeeded": "FINISHED", "job.failed": "FAILED", "job.cancelled": "KILLED"}
MAX_PARAMS, MAX_METRICS = 100, 1000  # of one call, as the server has it
MAX_VALUE_CHARS = 500
MAX_ANSWER_BYTES = 1024 * 1024
JOB_TAG, URL_TAG = "stillhouse.job_id", "stillhouse.url"
EXISTS = "RESOURCE_ALREADY_EXISTS"


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.text)
        self.answer = answer


class MLflow(Sink):
    """A run for each job that has ended: its settings, metrics as series, where its artifacts are, and a model version.

    Sent again, the same run is completed, not another one made. `url` is that of the tracking server.

    Origin: the REST API of MLflow 2 and 3.
    """

    kind: Literal["mlflow"] = "mlflow"
    needs_points: ClassVar[bool] = True
    experiment: str = Field("stillhouse", min_length=1, max_length=200, description="Where runs are; made if need be.")
    registered_model: str | None = Field(
        None, min_length=1, max_length=200, description="Has a version of each job that has succeeded; made if need be."
    )
    alias: str | None = Field(
        None, pattern=r"^[A-Za-z][\w-]{0,99}$", description="What the newest version is called, such as 'champion'."
    )

    def send(self, message: Message) -> Answer:
        """Returns the last answer, or the first that is an error."""
        server = _Server(message.url, message.token)
        try:
            experiment = self._find_experiment(server)
            if message.job is not None and message.type in ENDS:
                run_id = self._put_run(server, experiment, message.job)
                self._put_values(server, run_id, message.job)
                if message.type == "job.succeeded" and self.registered_model:
                    self._put_version(server, self.registered_model, run_id, message.job)
                self._end_run(server, run_id, message.job, ENDS[message.type])
        except Refused as refused:
            return refused.answer
        except (LookupError, TypeError) as error:
            raise ValueError(f"{message.url} does not answer as MLflow does: {error!r}") from error
        return Answer(200, "")

    def _find_experiment(self, server: "_Server") -> str:
        try:
            return str(server.call("experiments/create", {"name": self.experiment})["experiment_id"])
        except Refused as refused:
            if EXISTS not in refused.answer.text:
                raise
        found = server.call("experiments/search", {"filter": f"name = '{_quoted(self.experiment)}'", "max_results": 1})
        return str(found["experiments"][0]["experiment_id"])

    def _put_run(self, server: "_Server", experiment: str, facts: JobFacts) -> str:
        """Returns the run of a job, which an earlier attempt may have made."""
        wanted = {"experiment_ids": [experiment], "filter": f"tags.`{JOB_TAG}` = '{facts.job.id}'", "max_results": 1}
        found = server.call("runs/search", wanted).get("runs")
        if found:
            return str(found[0]["info"]["run_id"])
        tags = {
            JOB_TAG: facts.job.id,
            "stillhouse.content_sha256": facts.job.content_sha256 or "",
            URL_TAG: _address(facts),
            **{f"stillhouse.artifact.{made.name}": f"sha256:{made.sha256}" for made in facts.artifacts},
            **facts.job.labels,
        }
        started = facts.job.started_at or facts.job.created_at
        run = {
            "experiment_id": experiment,
            "run_name": facts.job.name,
            "start_time": int(started.timestamp() * 1000),
            "tags": [{"key": key, "value": value[:MAX_VALUE_CHARS]} for key, value in tags.items()],
        }
        return str(server.call("runs/create", run)["run"]["info"]["run_id"])

    def _put_values(self, server: "_Server", run_id: str, facts: JobFacts) -> None:
        params = [{"key": key, "value": value[:MAX_VALUE_CHARS]} for key, value in _flat(facts.job.spec)]
        at = int((facts.job.finished_at or facts.job.created_at).timestamp() * 1000)
        metrics = [
            {"key": point.name, "value": point.value, "step": point.step, "timestamp": int(point.at.timestamp() * 1000)}
            for point in facts.points
            if math.isfinite(point.value)
        ]
        metrics += [
            {"key": f"{key}/result", "value": value, "step": 0, "timestamp": at}
            for key, value in facts.summary_numbers().items()
            if math.isfinite(value)
        ]
        for name, values, most in (("params", params, MAX_PARAMS), ("metrics", metrics, MAX_METRICS)):
            for start in range(0, len(values), most):
                server.call("runs/log-batch", {"run_id": run_id, name: values[start : start + most]})

    def _put_version(self, server: "_Server", name: str, run_id: str, facts: JobFacts) -> None:
        """Makes a version, unless an earlier attempt has."""
        try:
            server.call("registered-models/create", {"name": name})
        except Refused as refused:
            if EXISTS not in refused.answer.text:
                raise
        found = server.call("model-versions/search", {"filter": f"run_id = '{run_id}'"}, method="GET")
        versions = found.get("model_versions") or []
        if not versions:
            version = {"name": name, "source": f"hf://{_repo(facts)}", "run_id": run_id}  # it refuses other hosts
            tags = [{"key": JOB_TAG, "value": facts.job.id}, {"key": URL_TAG, "value": _address(facts)}]
            versions = [server.call("model-versions/create", version | {"tags": tags})["model_version"]]
        if self.alias:
            alias = {"name": name, "alias": self.alias, "version": versions[0]["version"]}
            server.call("registered-models/alias", alias)

    def _end_run(self, server: "_Server", run_id: str, facts: JobFacts, status: str) -> None:
        at = int((facts.job.finished_at or facts.job.created_at).timestamp() * 1000)
        server.call("runs/update", {"run_id": run_id, "status": status, "end_time": at})


class _Server:
    """A tracking server."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"content-type": "application/json"}
        if token:
            self.headers["authorization"] = f"Bearer {token}" if ":" not in token else f"Basic {_basic(token)}"

    def call(self, path: str, body: dict[str, Any], method: str = "POST") -> dict[str, Any]:
        """Returns what the server answers. Raises Refused."""
        address = urlsplit(f"{self.url}/api/2.0/mlflow/{path}")
        data = b""
        if method == "GET":
            address = address._replace(query=urlencode(body))
        else:
            data = json.dumps(body).encode()
        answer = request(method, urlunsplit(address), self.headers, data, most_bytes=MAX_ANSWER_BYTES)
        if answer.status >= 300:
            raise Refused(answer)
        found: dict[str, Any] = json.loads(answer.text or "{}")
        return found


def _basic(token: str) -> str:
    return b64encode(token.encode()).decode()


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _repo(facts: JobFacts) -> str:
    return f"{facts.tenant}/{repo_name(facts.job)}"


def _address(facts: JobFacts) -> str:
    """Returns where a job's model is had, by whoever has a key."""
    return f"{get_settings().public_url.rstrip('/')}/hub/{_repo(facts)}"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields each setting of a spec with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{place}")
    elif value is not None:
        yield path, str(value)
