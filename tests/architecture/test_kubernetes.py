"""The manifests describe what the code reads and answers."""

from pathlib import Path
from typing import Any

import yaml

from app.main import app
from core.queue import QUEUES
from core.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
FILES = {path.name: [one for one in yaml.safe_load_all(path.read_text()) if one] for path in FOLDER.glob("*.yaml")}
MANIFESTS = [manifest for name, found in FILES.items() if name != "kustomization.yaml" for manifest in found]
SECRETS = {"STILLHOUSE_DATABASE_URL", "STILLHOUSE_SECRET_KEY"}


def _containers(name: str) -> list[dict[str, Any]]:
    return [
        container
        for manifest in MANIFESTS
        if manifest["metadata"]["name"] == name and manifest["kind"] in {"Deployment", "Job"}
        for container in manifest["spec"]["template"]["spec"]["containers"]
    ]


def test_every_variable_is_a_setting() -> None:
    names = {f"STILLHOUSE_{name.upper()}" for name in Settings.model_fields}
    told = {key for manifest in MANIFESTS if manifest["kind"] == "ConfigMap" for key in manifest["data"]}
    given = {one["name"] for queue in QUEUES for one in _containers(f"worker-{queue}")[0]["env"]}
    assert told | given | SECRETS <= names
    assert not told & SECRETS


def test_each_queue_has_workers_that_take_its_jobs_in_time() -> None:
    grace_s = Settings.model_fields["stop_grace_s"].default
    for queue in QUEUES:
        (container,) = _containers(f"worker-{queue}")
        assert f"--queues={queue}" in container["args"]
        assert container["env"] == [{"name": "STILLHOUSE_QUEUES", "value": queue}]
        (pod,) = (one["spec"]["template"]["spec"] for one in FILES[f"worker-{queue}.yaml"])
        assert pod["terminationGracePeriodSeconds"] > grace_s
        assert f"queue = '{queue}'" in str(FILES["scaling.yaml"])


def test_probes_ask_what_the_api_answers() -> None:
    (container,) = _containers("api")
    asked = {container[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")}
    assert asked <= {route.path for route in app.state.routes}
    folders = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert folders == {"/data/blobs"}  # as the image has it in STILLHOUSE_STORAGE_DIR
    assert "STILLHOUSE_STORAGE_DIR=/data/blobs" in (FOLDER.parents[1] / "Dockerfile").read_text()


def test_the_kustomization_names_every_file() -> None:
    (kustomization,) = FILES["kustomization.yaml"]
    assert set(kustomization["resources"]) == FILES.keys() - {"kustomization.yaml", "scaling.yaml"}
