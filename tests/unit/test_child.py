"""The server that forks the stages: what it hands down, and what is left when it or its owner dies."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_bench import FAST, Bench, make_spec
from worker.child import ForkServer

LONG = [{"kind": "finetune", **FAST, "epochs": 1000}]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "bench", ForkServer(1, tmp_path / "cache")).lay()
    yield bench
    bench.server.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_stage_inherits_no_secret_and_no_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_HUB_TOKEN", "hush")
    with bench.start(bench.write_order(make_spec(LONG), 0, "long")) as stage:
        stage.reports.readline()
        server = parent_of(stage.pid)
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in (server, stage.pid)]
        assert not any(word in text for text in environments for word in (b"STILLHOUSE", b"hush", b"postgres"))
        assert len(os.listdir(f"/proc/{server}/task")) == 1
        assert os.getsid(stage.pid) == os.getpgid(stage.pid) == stage.pid
        assert os.readlink(f"/proc/{stage.pid}/cwd") == str(bench.root / "long")
        targets = {os.readlink(f"/proc/{stage.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{stage.pid}/fd")}
        assert not any("socket" in target for target in targets)


def test_a_killed_server_takes_its_stage_along_and_is_replaced(bench: Bench) -> None:
    spec = make_spec(LONG)
    with bench.start(bench.write_order(spec, 0, "first")) as stage:
        stage.reports.readline()
        os.kill(parent_of(stage.pid), signal.SIGKILL)
        assert stage.exit_code.read() == b""
        stage.reports.read()  # ends when the process is gone
    with bench.start(bench.write_order(spec, 0, "second")) as stage:
        assert stage.reports.readline()


def test_stages_end_with_their_owner(bench: Bench) -> None:
    order = bench.write_order(make_spec(LONG), 0, "long")
    program = (
        "import sys; from pathlib import Path; from worker.child import ForkServer\n"
        f"stage = ForkServer(1, Path({str(bench.root)!r}) / 'cache').fork(Path({str(order)!r}), Path('log'))\n"
        "stage.reports.readline(); print(stage.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stdin=-1, cwd=bench.root) as owner:
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
        owner.kill()
        ended, _, _ = select.select([pidfd], [], [], 30)
        assert ended


def test_a_server_that_cannot_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConnectionError, match="forks stages"):
        ForkServer(1, tmp_path / "cache").fork(tmp_path / "order.json", tmp_path / "log")
