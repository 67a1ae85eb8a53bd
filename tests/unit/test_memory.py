"""Whether a process has used up its address space, seen of real processes."""

import subprocess
import sys

import pytest

from core.memory import has_filled_memory, out_of_memory

PROCESS = """
import resource, sys
limit, share = 2**30, float(sys.argv[1])
if share:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    held = bytearray(int(share * limit))
    try:
        bytearray(limit)
    except MemoryError:
        pass
    del held
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("share", "filled"), [(0, False), (0.5, False), (0.92, True)])
def test_the_peak_is_held_against_the_limit(share: float, filled: bool) -> None:
    command = [sys.executable, "-c", PROCESS, str(share)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert has_filled_memory(process.pid) is filled
        process.stdin.close()
    assert has_filled_memory(process.pid) is False  # it is gone


def test_it_is_told_with_what_was_seen() -> None:
    report = out_of_memory("exit code -6").report()
    assert report["reason"] == "out_of_memory"
    assert "exit code -6" in report["message"]
    assert "batch_size" in report["suggestion"]
