"""What several files of tests start."""

from collections.abc import Iterator

import pytest

from worker.child import ForkServer


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A server whose stages compute in float32 on every processor: half precision turns what nearly ties."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "from worker.engine.child import set_environment\n"
        "set_environment(1)\n"  # which numpy and torch read when they are imported
        "from worker.kernels import precision\n"
        "precision.BF16_FLAGS = frozenset()\n"
    )
    server = ForkServer(1, site / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        server._ensure()  # no other server starts with it
    yield server
    server.close()
