"""Multipart bodies that are read from disk while they are sent."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from stillhouse.errors import InvalidInput

MODEL_SUFFIXES = {".safetensors", ".json", ".model", ".txt", ".md", ".jinja"}
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
    """Returns what to push of a model folder, by relative path: the kinds of files that a model is made of.

    Raises:
        InvalidInput: There is no config.json, or the only weights are of a kind that can hold code.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder. Name the folder that holds config.json and the weights.")
    found = {path: file for path, file in _list_files(folder).items() if file.suffix.lower() in MODEL_SUFFIXES}
    if "config.json" not in found:
        raise InvalidInput(f"{folder} holds no config.json, so it is no Hugging Face model folder.")
    if not any(path.endswith(".safetensors") for path in found):
        raise InvalidInput(f"{folder} holds no .safetensors file. `save_pretrained` of transformers writes one.")
    return found


def left_out(folder: Path, sent: Iterable[str]) -> list[str]:
    """Returns the files of the folder that are not sent."""
    return sorted(_list_files(folder).keys() - set(sent))


def _list_files(folder: Path) -> dict[str, Path]:
    """Returns the files that are not hidden, by relative path."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {key.as_posix(): path for key, path in paths.items() if not any(p.startswith(".") for p in key.parts)}
