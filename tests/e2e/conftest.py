"""A stack with a pico model and data in it."""

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
def taught(tmp_path: Path, tenant: tuple[str, str], pico_files: tuple[Path, dict[str, Path]]) -> Iterator[Stack]:
    """A tenant with a small model, data, and the key of the teacher's API as a secret."""
    stack = Stack(tmp_path, tenant[1])
    try:
        stack.start_api(**SETTINGS)
        stack.push_model(pico.write_model(tmp_path / "small", num_layers=1), "small")
        stack.push_data(pico_files[1], "toy")
        assert stack.http.put("/v1/secrets/teacher-key", json={"value": KEY}).status_code == 200
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a model but not for what its training writes."""
    with mounted(tmp_path / "disk", "size=160k") as folder:
        yield folder
