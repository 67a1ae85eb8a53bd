"""Multipart bodies that are read from disk while they are sent."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from stillhouse.errors import InvalidInput

Part = tuple[str, tuple[str, IO[bytes], str]]


@contextmanager
def open_parts(files: Iterable[tuple[str, str, Path]]) -> Iterator[list[Part]]:
    """Yields the parts for each `(field, file name, path)`, open for the time of the request. Raises InvalidInput."""
    with ExitStack() as stack:
        parts: list[Part] = []
        for field, name, path in files:
            try:
                file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise InvalidInput(f"Cannot read {path}: {error.strerror}.") from error
            parts.append((field, (name, file, "application/octet-stream")))
        yield parts


def model_files(folder: Path) -> dict[str, Path]:
    """Returns what to push of a model folder, by relative path: everything but hidden files. Raises InvalidInput."""
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder. Name the folder that holds config.json and the weights.")
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = path
    if "config.json" not in found:
        raise InvalidInput(f"{folder} holds no config.json, so it is no Hugging Face model folder.")
    return found
