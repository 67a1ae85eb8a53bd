"""What a user does with a Python client that `openapi-python-client` generated: prints as JSON what it found.

python generated_driving.py FOLDER_OF_THE_PACKAGE URL KEY
"""

import importlib
import json
import sys
from typing import Any

SPEC = {
    "name": "typed",
    "task": {"kind": "text_classification", "text": "text", "label": "label"},
    "teacher": {"kind": "model", "model": "minilm"},
    "student": {"kind": "teacher_layers", "keep": [0, 2]},
    "data": "tickets",
    "stages": [{"kind": "distill", "epochs": 1}, {"kind": "export", "formats": [{"kind": "onnx_int8"}]}],
}


def main(folder: str, url: str, key: str) -> dict[str, Any]:
    """Returns what was found."""
    sys.path.insert(0, folder)
    client = importlib.import_module("stillhouse_api").AuthenticatedClient(base_url=url, token=key)
    models = importlib.import_module("stillhouse_api.models")

    def call(operation: str, group: str = "jobs") -> Any:
        return importlib.import_module(f"stillhouse_api.api.{group}.{operation}").sync

    spec = models.JobSpec.from_dict(SPEC)
    made = call("create_job")(client=client, body=spec)
    assert hasattr(made, "id"), made
    shown = call("get_job")(job_id=made.id, client=client)
    listed = call("list_jobs")(client=client, limit=5)
    cancelled = call("cancel_job")(job_id=made.id, client=client)
    unknown = call("get_job")(job_id="job_0", client=client)
    return {
        "spec": spec.to_dict() == SPEC,
        "stages": [stage.kind for stage in shown.stages],
        "listed": [job.name for job in listed.data],
        "state": str(cancelled.state),
        "unknown": unknown.error.code,
        "types": sorted({type(one).__name__ for one in (made, listed, unknown)}),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
