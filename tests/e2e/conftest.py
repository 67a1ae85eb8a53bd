"""A stack with a pico model and data in it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pico
from tests.disks import mounted
from tests.e2e.stack import Stack
from tests.e2e.teaching import SETTINGS
from tests.teacher_api import KEY


@pytest.fixture(scope="session")
def pico_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("pico")
    return pico.write_model(folder / "model"), pico.write_data(folder / "data")


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An API that no test disturbs."""
    stack = Stack(tmp_path_factory.mktemp("api"), "nobody")
    try:
        stack.start_api(**SETTINGS)
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def worker(api: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """The one worker of all tests of a file: it takes any tenant's jobs, so none of them may start another."""
    stack = Stack(tmp_path_factory.mktemp("worker"), "nobody", api.port)
    try:
        yield stack.start_worker(**SETTINGS)
    finally:
        stack.stop()


@pytest.fixture
def stack(
    api: Stack, tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]
) -> Iterator[Stack]:
    """A tenant with a model and data, and whatever workers the test starts."""
    stack = Stack(tmp_path, tenant[1], api.port)
    try:
        stack.push_pico(*pico_files)
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def own_api(tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]) -> Iterator[Stack]:
    """The same with an API of its own, the first of its processes."""
    stack = Stack(tmp_path, tenant[1])
    try:
        stack.start_api()
        stack.push_pico(*pico_files)
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def taught(stack: Stack, tmp_path: Path) -> Stack:
    """The same with a smaller model, and the key of the teacher's API as a secret."""
    stack.push_model(pico.write_model(tmp_path / "small", num_layers=1), "small")
    assert stack.http.put("/v1/secrets/teacher-key", json={"value": KEY}).status_code == 200
    return stack


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a model but not for what its training writes."""
    with mounted(tmp_path / "disk", "size=160k") as folder:
        yield folder
