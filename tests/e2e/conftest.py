"""A stack with a pico model and data in it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pico
from tests.e2e.stack import Stack


@pytest.fixture(scope="session")
def pico_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("pico")
    return pico.write_model(folder / "model"), pico.write_data(folder / "data")


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an API that no test disturbs."""
    stack = Stack(tmp_path_factory.mktemp("api"), "nobody")
    try:
        stack.start_api()
        yield stack.port
    finally:
        stack.stop()


@pytest.fixture
def stack(
    api: int, tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]
) -> Iterator[Stack]:
    """A tenant with a model and data, and whatever workers the test starts."""
    stack = Stack(tmp_path, tenant[1], api)
    try:
        stack.push_model(pico_files[0], "pico")
        stack.push_data(pico_files[1], "toy")
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def own_api(tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]) -> Iterator[Stack]:
    """The same with an API of its own, the first of its processes."""
    stack = Stack(tmp_path, tenant[1])
    try:
        stack.start_api()
        stack.push_model(pico_files[0], "pico")
        stack.push_data(pico_files[1], "toy")
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a model but not for what its training writes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a full disk needs the right to mount a small one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
