"""Rows of a split in files of a bounded size, so that none of it but one file, or one batch, is ever in memory.

`<stem>-00000.safetensors` and so on hold tensors of the same names. Each file but the last has as many rows of a tensor
as the first one.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

SHARD_BYTES = 64 * 1024 * 1024


def shard_path(folder: Path, stem: str, number: int) -> Path:
    """Returns where the file of this number lies, counted from 0."""
    return folder / f"{stem}-{number:05d}.safetensors"


class Shards:
    """The rows in the files of a folder that have this stem."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._paths = sorted(folder.glob(f"{stem}-*.safetensors"))

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields the tensors of each file, which are mapped into memory, so that only what is asked for is read."""
        return map(load_file, self._paths)

    @property
    def names(self) -> set[str]:
        """The names of the tensors."""
        return set(self._first)

    @property
    def about(self) -> dict[str, Any]:
        """What the metadata of the first file hold, as JSON under `about`."""
        with safe_open(self._paths[0], framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["about"])
        return found

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        return load_file(self._paths[0])

    def read(self, names: Sequence[str], rows_N: Tensor) -> list[Tensor]:
        """Returns these rows of tensors that have equally many.

        A file is mapped only for as long as that takes: what is read of it would else stay in memory, and all of it
        counts as address space.
        """
        firsts = [self._first[name] for name in names]
        found, size = [first.new_empty(len(rows_N), *first.shape[1:]) for first in firsts], len(firsts[0])
        shards_N = rows_N // size
        for number in shards_N.unique().tolist():
            is_here_N, tensors = shards_N == number, load_file(self._paths[number])
            rows_M = rows_N[is_here_N] - number * size
            for name, rows in zip(names, found, strict=True):
                rows[is_here_N] = tensors[name][rows_M]
        return found
