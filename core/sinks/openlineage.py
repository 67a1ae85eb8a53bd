"""OpenLineage."""

import json
import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from core.sinks.facts import JobFacts
from core.sinks.sink import Message, Sink
from core.webhooks.guard import Answer, request

SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
PRODUCER = "https://github.com/stillhouse/stillhouse"
TYPES = {
    "job.running": "START",
    "job.succeeded": "COMPLETE",
    "job.failed": "FAIL",
    "job.cancelled": "ABORT",
}


class OpenLineage(Sink):
    """A run event for each change of a job's state; data sets and models are its inputs, and artifacts its outputs.

    Origin: the OpenLineage specification 2.0.2, RunEvent.
    """

    kind: Literal["openlineage"] = "openlineage"
    namespace: str = Field("stillhouse", min_length=1, max_length=200, description="Namespace of jobs and data sets.")

    def send(self, message: Message) -> Answer:
        """Returns the answer; an event that OpenLineage has no word for, or a test, is a RUNNING."""
        headers = {"content-type": "application/json"}
        if message.token:
            headers["authorization"] = f"Bearer {message.token}"
        return request("POST", message.url, headers, json.dumps(self.event(message)).encode())

    def event(self, message: Message) -> dict[str, Any]:
        """Returns the run event."""
        facts = message.job
        moment = json.loads(message.body).get("timestamp") or datetime.now(UTC).isoformat()
        run_id = uuid.UUID(facts.job.id.removeprefix("job_")) if facts else uuid.uuid5(uuid.NAMESPACE_URL, message.id)
        return {
            "eventType": TYPES.get(message.type, "RUNNING"),
            "eventTime": moment,
            "producer": PRODUCER,
            "schemaURL": SCHEMA,
            "run": {"runId": str(run_id)},
            "job": {"namespace": self.namespace, "name": facts.job.name if facts else message.type},
            "inputs": self._inputs(facts) if facts else [],
            "outputs": self._outputs(facts) if facts else [],
        }

    def _inputs(self, facts: JobFacts) -> list[dict[str, str]]:
        data = {f"{split['dataset_id']}/{split['split']}" for split in facts.job.inputs.get("data", {}).values()}
        models = {
            str(source.get("model_id") or source.get("job_id") or source.get("hub", {}).get("repo"))
            for source in facts.job.inputs.values()
            if isinstance(source, dict) and source.keys() & {"model_id", "job_id", "hub"}
        }
        return [{"namespace": self.namespace, "name": name} for name in sorted(data | models)]

    def _outputs(self, facts: JobFacts) -> list[dict[str, str]]:
        return [{"namespace": self.namespace, "name": f"{facts.job.id}/{made.name}"} for made in facts.artifacts]
