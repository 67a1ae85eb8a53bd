"""Libraries that not every worker has: each is an extra of its own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import StageFailed

# It tells the makers of OpenVINO of every import, unless it is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Has the imports inside name what is to be installed where a package is missing.

    Raises:
        StageFailed: `export_unsupported` when a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise StageFailed(
            "export_unsupported",
            f"The package '{str(error.name).partition('.')[0]}' is not installed on this worker.",
            suggestion=f"Run there: pip install 'stillhouse[{extra}]'. Or leave the form {extra} out.",
        ) from error
