"""What several files of tests start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.child import ForkServer
from worker.kernels.precision import _seconds_of_product


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A server whose stages compute in float32 on every processor: half precision turns what nearly ties."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "from worker.engine.child import set_environment\n"
        "set_environment(1)\n"  # which numpy and torch read when they are imported
        "from worker.kernels import precision\n"
        f"precision.{_seconds_of_product.__name__} = lambda dtype: 1.0\n"  # by which half precision is no faster
    )
    yield from serve(site)


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A server whose stages write what they keep of tokens in files of 32 KB, and checkpoints without a pause."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "from worker.engine.child import set_environment\n"
        "set_environment(1)\n"
        "from worker.engine import checkpoints, shards\n"
        "checkpoints.COST_FACTOR = 0\n"
        "shards.SHARD_BYTES = 2**15\n"
    )
    yield from serve(site)


def serve(site: Path) -> Iterator[ForkServer]:
    """Yields a server that runs the `sitecustomize.py` of a folder first."""
    server = ForkServer(1, site / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        server._ensure()  # no other server starts with it
    yield server
    server.close()
