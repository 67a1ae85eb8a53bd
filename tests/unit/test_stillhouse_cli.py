"""The command line as a program: help, exit codes, streams."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
    clean["STILLHOUSE_DATA_DIR"] = "/nowhere/stillhouse"
    return subprocess.run(
        [sys.executable, "-m", "stillhouse", *arguments],
        capture_output=True,
        text=True,
        env=clean | environment,
        stdin=subprocess.DEVNULL,
    )


ABSENT = {"STILLHOUSE_URL": "http://127.0.0.1:9", "STILLHOUSE_API_KEY": "sk_a_b"}


def test_help_teaches() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for word in ("up", "models", "datasets", "jobs", "predict", "methods", "keys", "Exit codes"):
        assert word in shown.stdout
    shown = run("jobs", "submit", "--help")
    assert "  stillhouse jobs submit job.yaml --watch\n" in shown.stdout, "an example keeps its line"


def test_version() -> None:
    assert re.fullmatch(r"stillhouse \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (("nonsense",), {}, 2, "No such command"),
        (("jobs", "submit"), {}, 2, "Missing argument"),
        (("jobs", "list"), {}, 4, "stillhouse up"),
        (("jobs", "list"), {"STILLHOUSE_URL": "http://127.0.0.1:9"}, 4, "STILLHOUSE_API_KEY"),
        (("keys", "list"), ABSENT, 5, "does not answer"),
        (("jobs", "submit", "/nowhere.yaml"), ABSENT, 2, "Cannot read /nowhere.yaml"),
        (("models", "push", "/nowhere", "m"), ABSENT, 2, "no folder"),
        (("datasets", "push", "d"), ABSENT, 2, "--train FILE"),
        (("predict", "/nowhere", "text"), {}, 2, "model.onnx"),
        (("up", "--data-dir", "/dev/null/x"), {}, 5, "--data-dir"),
        (("jobs", "list"), ABSENT | {"STILLHOUSE_URL": "http://localhost:abc"}, 4, "STILLHOUSE_URL"),
        (("keys", "create", "ci", "--expires-days", "3000000"), ABSENT, 2, "--expires-days"),
        (("fsck",), {"STILLHOUSE_DATABASE_URL": "postgresql://127.0.0.1:9/x"}, 2, "STILLHOUSE_STORAGE_DIR"),
        (
            ("fsck", "--data-dir", "/nowhere"),
            {"STILLHOUSE_DATABASE_URL": "postgresql+psycopg://127.0.0.1:9/x", "STILLHOUSE_NUM_THREADS": "two"},
            2,
            "STILLHOUSE_NUM_THREADS: Input should be a valid integer",
        ),
    ],
)
def test_exit_codes_and_remedies(arguments: tuple, environment: dict, code: int, words: str) -> None:
    ended = run(*arguments, **environment)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


def test_a_reader_that_has_enough_is_no_failure() -> None:
    command = f"set -o pipefail; {sys.executable} -m stillhouse jobs submit --help | head -1"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


def test_a_damaged_model_and_other_than_utf8_are_told(tmp_path: Path) -> None:
    for name, content in (("model.onnx", "x"), ("tokenizer.json", "{"), ("labels.json", '["a", "b"]')):
        (tmp_path / name).write_text(content)
    ended = run("predict", str(tmp_path), "text")
    assert (ended.returncode, "tokenizer.json cannot be read" in ended.stderr) == (2, True), ended.stderr
    assert "Traceback" not in ended.stderr


def test_errors_are_json_if_results_are() -> None:
    ended = run("jobs", "list", "--json", **ABSENT)
    assert ended.returncode == 5
    assert json.loads(ended.stderr)["error"]["code"] == "unreachable"


def test_importing_the_client_loads_no_server() -> None:
    script = (
        "import sys, stillhouse.client, stillhouse.cli; print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert not {"app", "core", "worker", "torch", "fastapi", "sqlalchemy", "numpy"} & set(eval(loaded.stdout))
