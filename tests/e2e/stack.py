"""API and workers as real processes, on the database and broker of the test run."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

FAST = {
    "STILLHOUSE_HEARTBEAT_S": "0.5",
    "STILLHOUSE_LEASE_S": "5",
    "STILLHOUSE_POLL_S": "1",
    "STILLHOUSE_RECONCILE_S": "0.5",
}
LONG = [{"kind": "finetune", "epochs": 1000, "batch_size": 4}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], Any], seconds: float = 120, every_s: float = 0.1) -> Any:
    """Returns the condition's first true value; fails the test when there is none in time."""
    pause, left = threading.Event(), seconds
    while not (value := condition()):
        left -= every_s
        assert left > 0, "waited in vain"
        pause.wait(every_s)
    return value


class Stack:
    """One API and any number of workers; everything ends with it."""

    def __init__(self, folder: Path, key: str, port: int | None = None) -> None:
        """With a port, the API is somebody else's, who started it there."""
        self.folder = folder
        self.port = port or free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {key}"}, timeout=30
        )

    def start_api(self, **settings: str) -> subprocess.Popen[bytes]:
        command = ["uvicorn", "app.main:app", "--host", "127.0.0.1", "--port", str(self.port), "--log-level", "warning"]
        process = self._start("api", [sys.executable, "-m", *command], settings)
        until(lambda: self.answers())
        return process

    def start_worker(self, **settings: str) -> subprocess.Popen[bytes]:
        command = (
            "celery -A worker.celery_app:app worker --pool threads --concurrency 1 -Q cpu"
            " --without-mingle --without-gossip"
        )
        number = len(self.processes)
        arguments = [sys.executable, "-m", *command.split(), "-n", f"w{number}@test"]
        return self._start(f"worker{number}", arguments, FAST | {"STILLHOUSE_NUM_THREADS": "1"} | settings)

    def answers(self) -> bool:
        try:
            return self.http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.http.close()

    def push_pico(self, model: Path, splits: dict[str, Path]) -> None:
        """Pushes what the specs of `submit` name."""
        self.push_model(model, "pico")
        self.push_data(splits, "toy")

    def push_model(self, folder: Path, name: str) -> None:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        answer = self.http.post("/v1/models", data={"name": name}, files=files)
        assert answer.status_code == 201, answer.text

    def push_data(self, paths: dict[str, Path], name: str) -> None:
        files = [(split, (path.name, path.read_bytes())) for split, path in paths.items()]
        answer = self.http.post("/v1/datasets", data={"name": name}, files=files)
        assert answer.status_code == 201, answer.text

    def submit(self, **changes: Any) -> str:
        spec = {
            "teacher": {"model": "pico"},
            "student": {"kind": "teacher_layers", "keep": [0, 2]},
            "data": "toy",
            "stages": [{"kind": "finetune", "epochs": 1, "batch_size": 16}],
        }
        answer = self.http.post("/v1/jobs", json=spec | changes)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, job_id: str, seconds: float = 180) -> dict[str, Any]:
        """Returns the job once it has ended."""

        def ended() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["state"] in {"succeeded", "failed", "cancelled"} else None

        return until(ended, seconds)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        return self.http.get(f"/v1/jobs/{job_id}/events", params={"limit": 100}).json()["data"]

    def hashes(self, job_id: str) -> dict[str, str]:
        """Returns the sha256 of every artifact file."""
        artifacts = self.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
        return {f"{a['name']}/{f['path']}": f["sha256"] for a in artifacts for f in a["files"]}

    def _start(self, name: str, command: list[str], settings: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | settings, cwd=self.folder)
        self.processes.append(process)
        return process


def children_of(pid: int) -> list[int]:
    """Returns the stage processes of a worker, which the process forks that has the libraries imported."""
    servers = _children(pid)
    return [stage for server in servers for stage in _children(server)]


def running_child(stack: Stack, job_id: str, pid: int) -> int:
    """Waits until the job's stage makes steps, and returns its process."""
    until(lambda: stack.job(job_id)["stages"][0]["step"] > 0)
    return children_of(pid)[0]


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}/fd")


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == pid and b"worker.engine.forkserver" in command:
            found.append(int(folder.name))
    return found
