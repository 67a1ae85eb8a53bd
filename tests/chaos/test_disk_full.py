"""A disk that fills at any write of a job: nothing half-written is accepted, and the job ends once there is room."""

import mmap
import shutil
import struct
import subprocess
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from core.settings import get_settings
from tests.chaos import proving
from tests.e2e.stack import Stack, until

pytestmark = pytest.mark.chaos
SOURCE = Path(__file__).parent / "disk" / "full_disk.c"
LENGTHS = (1, 10, 100)  # refused calls: one that passes, a stage's end, more than the retries outlast


class Disk:
    """Where the worker's files lie; all calls of its processes that use space there are counted, and can be refused."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("a disk that is full at one write needs a C compiler")
        folder.mkdir()
        library, state = folder / "full_disk.so", folder / "state"
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        state.write_bytes(bytes(24))
        with state.open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), 24)
        self.settings = {
            "LD_PRELOAD": str(library),
            "FULL_DISK_ROOT": str(get_settings().storage_dir.parent.resolve()),
            "FULL_DISK_STATE": str(state),
        }

    def refuse(self, first: int, length: int) -> None:
        """Starts to count anew, and refuses so many calls from that one on."""
        self._state[:] = struct.pack("3q", 0, first, length)

    def count(self) -> int:
        """Returns the number of calls since."""
        return struct.unpack_from("q", self._state)[0]


def test_a_full_disk_at_every_kth_write(
    stack: Stack, tmp_path: Path, record: Callable[..., None], scaled: Callable[[int], int]
) -> None:
    disk, before = Disk(tmp_path / "disk"), proving.find_damage()
    worker = stack.start_worker(**proving.EAGER, **disk.settings)
    proving.clean_run(stack)  # which an earlier test may have done, on another disk
    disk.refuse(0, 0)
    assert stack.wait(proving.submit(stack), 600)["state"] == "succeeded"
    num_writes = disk.count()
    assert num_writes > 100
    firsts = range(1, num_writes, max(1, num_writes // scaled(60)))
    lengths, num_failed = cycle(LENGTHS), 0
    for first in firsts:
        disk.refuse(first, next(lengths))
        job_id = proving.submit(stack)
        while (job := stack.wait(job_id, 300))["state"] == "failed":
            assert job["error"]["reason"] == "storage_full", job
            num_failed += 1
            disk.refuse(0, 0)
            job_id = stack.http.post(f"/v1/jobs/{job_id}/retry").json()["id"]
        assert job["state"] == "succeeded", job
        assert stack.answers()
        assert proving.content(job_id) == proving.clean_run(stack)["content"]
        assert stack.hashes(job_id) == proving.clean_run(stack)["files"]
        until(lambda job_id=job_id: not proving.folders_of(job_id), 30)
    assert worker.poll() is None
    assert proving.find_damage() <= before
    seen = f"of {num_writes} writes; same hash each time, {num_failed} jobs failed and were retried, 0 corrupt files"
    record("disk full at every k-th write", len(firsts), seen, "same hash, 0 corrupt files, the API stays up")
