"""`stillhouse up` as a user meets it: started, found, killed, doubled, stopped."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from stillhouse.processes import command_line, is_alive, list_processes, wait_until
from tests import pico

SPEC = """
name: toy
teacher: {model: pico}
student: {kind: teacher_layers, keep: [0, 2]}
data: toy
stages:
  - {kind: finetune}
  - {kind: distill, epochs: 1}
  - {kind: export, formats: [{kind: onnx_int8, min_agreement: 0.01}]}
  - {kind: evaluate, latency_samples: 10}
"""


def hear_signals() -> None:
    """Forgets what a test run in the background ignores: a program that is started so leaves it at that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Up:
    """One `stillhouse up` and what it said."""

    def __init__(self, folder: Path, *options: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        self.folder = folder
        self.words = folder.with_suffix(".err")
        with self.words.open("wb") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stillhouse", "up", "--data-dir", str(folder), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env=clean | {"STILLHOUSE_POLL_S": "1"},
                start_new_session=True,
                preexec_fn=hear_signals,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.words.read_text()
        self.facts = json.loads(line)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        return subprocess.run(
            [sys.executable, "-m", "stillhouse", *arguments],
            capture_output=True,
            text=True,
            env=clean | {"STILLHOUSE_DATA_DIR": str(self.folder)},
        )

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)  # longer than all programs together may take before they are killed


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sh-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Up]:
    running = Up(folder / "data")
    yield running
    running.end(signal.SIGKILL)
    assert wait_until(lambda: not children(running.folder), 20), children(running.folder)


def children(folder: Path) -> list[int]:
    """Returns every process that works in the folder, names it, or holds its settings: nothing may be left of it."""
    return [
        pid
        for pid in list_processes()
        if pid != os.getpid() and is_alive(pid) and (_mentions(pid, str(folder)) or _holds(pid, str(folder)))
    ]


def _mentions(pid: int, folder: str) -> bool:
    return any(folder in part for part in command_line(pid))


def _holds(pid: int, folder: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return folder in environment or os.readlink(f"/proc/{pid}/cwd").startswith(folder)
    except OSError:
        return False


def one(folder: Path, word: str) -> int:
    found = [pid for pid in children(folder) if word in command_line(pid)]
    assert len(found) == 1, found
    return found[0]


def test_it_says_where_it_is_and_the_command_line_finds_it(up: Up) -> None:
    assert httpx.get(f"{up.facts['url']}/readyz").status_code == 200
    assert Path(up.facts["key_file"]).read_text().strip() == up.facts["api_key"]
    assert Path(up.facts["key_file"]).stat().st_mode & 0o777 == 0o600
    listed = up.cli("keys", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert [key["name"] for key in json.loads(listed.stdout)] == ["local"]
    missing = up.cli("jobs", "show", "nothing")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert up.cli("models", "show", "nothing").returncode == 3
    second = up.cli("up", "--data-dir", str(up.folder))
    assert second.returncode == 2
    assert f"already runs on {up.folder} at {up.facts['url']}" in second.stderr


def test_signals_and_a_kill_stop_all_of_it_and_the_next_start_has_the_same_key(folder: Path) -> None:
    place = folder / "again"
    keys = set()
    for number, code in ((signal.SIGINT, 0), (signal.SIGKILL, -9), (signal.SIGHUP, 0)):
        running = Up(place)
        keys.add(running.facts["api_key"])
        assert len(children(place)) >= 5
        assert running.end(number) == code
        assert wait_until(partial(is_gone, place), 20 if code else 0), [command_line(pid) for pid in children(place)]
        assert (place / "stack.json").exists() == bool(code)
    assert len(keys) == 1


def test_a_dead_api_and_a_dead_worker_are_started_again(up: Up) -> None:
    for word in ("app.main:app", "worker.celery_app:app"):
        kill(one(up.folder, word))
        assert wait_until(partial(runs, up.folder, word), 20)
    assert wait_until(lambda: answers(up.facts["url"]), 20)
    assert "api ended (exit code -9); it starts again in 0.5 s" in up.words.read_text()


def test_a_dead_database_and_a_dead_broker_come_back_under_their_addresses(up: Up) -> None:
    for program in ("postgres", "redis-server"):
        kill(next(pid for pid in children(up.folder) if f"/{program}" in command_line(pid)[0]))
    assert wait_until(lambda: answers(up.facts["url"]), 30)


def test_beside_another_instance_and_on_a_taken_port(up: Up, folder: Path) -> None:
    beside = Up(folder / "beside", "--workers", "0")
    try:
        assert beside.facts["url"] != up.facts["url"]
        assert beside.facts["api_key"] != up.facts["api_key"]
        both = [httpx.get(f"{stack.facts['url']}/readyz").status_code for stack in (up, beside)]
        assert both == [200, 200]
    finally:
        assert beside.end(signal.SIGTERM) == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = up.cli("up", "--data-dir", str(folder / "beside"), "--port", str(port))
    assert refused.returncode == 2
    assert f"Port {port} is taken" in refused.stderr


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid), 5)


def is_gone(folder: Path) -> bool:
    return not children(folder)


def runs(folder: Path, word: str) -> bool:
    return any(word in command_line(pid) for pid in children(folder))


def runs_stage(folder: Path) -> bool:
    """Tells whether a process works in a stage's folder."""
    return any("/staging/job_" in os.readlink(f"/proc/{pid}/cwd") for pid in children(folder))


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def test_the_journey_of_a_job_by_the_command_line(up: Up, folder: Path) -> None:
    model, data = pico.write_model(folder / "model"), pico.write_data(folder / "files")
    spec = folder / "job.yaml"
    spec.write_text(SPEC)
    assert up.cli("models", "push", str(model), "pico").returncode == 0
    splits = [part for name, path in data.items() for part in (f"--{name}", str(path))]
    pushed = up.cli("datasets", "push", "toy", *splits)
    assert pushed.returncode == 0, pushed.stderr
    wrong = up.cli("jobs", "validate", str(spec), "--set", "stages=[{kind: distil}]")
    assert wrong.returncode == 2
    assert "did you mean 'distill'?" in wrong.stderr
    right = up.cli("jobs", "validate", str(spec))
    assert re.search(r"student: about [\d,]+ parameters, onnx_int8 [\d.]+ .B", right.stderr), right.stderr
    watched = up.cli("jobs", "submit", str(spec), "--watch", "--set", "seed=3")
    assert watched.returncode == 0, watched.stderr
    assert "evaluate: succeeded 100%" in watched.stderr
    shown = json.loads(up.cli("jobs", "show", "toy", "--json").stdout)
    assert shown["spec"]["seed"] == 3
    assert "stage evaluate starts" in up.cli("jobs", "logs", "toy").stdout
    out = folder / "out"
    loaded = up.cli("jobs", "download", "toy", "onnx_int8", "report", "--to", str(out), "--json")
    assert loaded.returncode == 0, loaded.stderr
    half = out / "onnx_int8" / "model.onnx"
    whole = half.read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    half.rename(half.with_name(f".model.onnx.{digest[:12]}.part"))
    half.with_name(f".model.onnx.{digest[:12]}.part").write_bytes(whole[: len(whole) // 2])
    assert up.cli("jobs", "download", "toy", "onnx_int8", "--to", str(out)).returncode == 0
    assert half.read_bytes() == whole, "continued by the real API"
    said = up.cli("predict", str(out / "onnx_int8"), "refund my money please", "--json")
    assert json.loads(said.stdout)[0]["labels"][0]["label"] in pico.WORDS
    missing = up.cli("jobs", "download", "toy", "nothing", "--to", str(out))
    assert missing.returncode == 2
    assert "Published: " in missing.stderr


def test_a_kill_in_the_middle_of_a_stage_leaves_nothing(up: Up, folder: Path) -> None:
    spec = folder / "long.yaml"
    spec.write_text(
        "{name: long, teacher: {model: pico}, student: {kind: teacher_layers, keep: [0]}, data: toy, "
        "stages: [{kind: finetune, epochs: 1000}, {kind: distill}]}"
    )
    assert up.cli("jobs", "submit", str(spec)).returncode == 0
    assert wait_until(partial(runs_stage, up.folder), 30)
    up.end(signal.SIGKILL)
    assert wait_until(partial(is_gone, up.folder), 20), [command_line(pid) for pid in children(up.folder)]
