"""What a user sees with `mlflow`: prints as JSON what it found. Needs nothing of this project.

python mlflow_reading.py URL_OF_THE_SERVER
"""

import json
import sys
from typing import Any

from mlflow import MlflowClient


def main(url: str) -> dict[str, Any]:
    """Returns what was found."""
    client = MlflowClient(tracking_uri=url, registry_uri=url)
    experiment = client.get_experiment_by_name("small models")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    found = []
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "finetune/loss")
        found.append(
            {
                "name": run.info.run_name,
                "status": run.info.status,
                "params": run.data.params,
                "tags": run.data.tags,
                "losses": [[point.step, point.value] for point in history],
                "accuracy": run.data.metrics.get("finetune/accuracy/result"),
                "ended": bool(run.info.end_time),
            }
        )
    versions = client.search_model_versions("name = 'tickets'")
    return {
        "runs": found,
        "versions": [[version.version, version.source, version.tags] for version in versions],
        "champion": client.get_model_version_by_alias("tickets", "champion").version if versions else None,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
