"""Clients that are generated from the OpenAPI document, in Python and TypeScript, and used against this server."""

import json
import shutil
from pathlib import Path

import pytest

from tests.api import Api
from tests.clients.conftest import Recorder, python_of, run

HERE = Path(__file__).parent
PACKAGES = HERE / "typescript" / "node_modules"
STAGES = ["distill", "export"]


@pytest.fixture
def document(api: Api, tmp_path: Path) -> Path:
    """Returns the document's file; what the jobs need is there by then."""
    assert api.push_dataset().status_code == 201
    assert api.push_model().status_code == 201
    place = tmp_path / "openapi.json"
    place.write_bytes(api("GET", "/openapi.json").content)
    return place


def test_python(api: Api, recorder: Recorder, document: Path, tmp_path: Path) -> None:
    python = python_of("openapi-python-client==0.29.1")
    place = str(tmp_path / "stillhouse_api")
    generate = ["generate", "--path", str(document), "--output-path", place, "--meta", "none"]
    said = run([python.with_name("openapi-python-client"), *generate])
    assert "will not be generated" not in said
    assert "Unable to" not in said
    told = run([python, HERE / "generated_driving.py", str(tmp_path), recorder.url, api.key])
    seen = json.loads(told.splitlines()[-1])
    assert (seen["spec"], seen["stages"], seen["listed"]) == (True, STAGES, ["typed"])
    assert (seen["state"], seen["unknown"]) == ("cancelled", "not_found")
    assert seen["types"] == ["ErrorEnvelope", "JobPage", "JobView"]


def test_typescript(api: Api, recorder: Recorder, document: Path, tmp_path: Path) -> None:
    """The compiler checks every name and type that the script uses."""
    if not PACKAGES.is_dir() or shutil.which("node") is None:
        pytest.skip("openapi-typescript is not there; `make test-clients` fetches it, with npm")
    shutil.copytree(HERE / "typescript", tmp_path / "ts", symlinks=True)
    tools = tmp_path / "ts" / "node_modules" / ".bin"
    run([tools / "openapi-typescript", str(document), "-o", str(tmp_path / "ts" / "schema.d.ts")])
    options = ["--strict", "--target", "es2022", "--module", "es2022", "--moduleResolution", "bundler"]
    driver = str(tmp_path / "ts" / "driving.ts")
    run([tools / "tsc", *options, "--skipLibCheck", "--lib", "es2022,dom", driver])
    told = run(["node", driver.replace(".ts", ".js"), recorder.url, api.key])
    seen = json.loads(told.splitlines()[-1])
    assert seen == {
        "stages": STAGES,
        "listed": ["typed"],
        "state": "cancelled",
        "unknown": "not_found",
        "bad": "stages.0.epochs",
    }
