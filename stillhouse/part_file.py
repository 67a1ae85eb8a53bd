"""A file that arrives in spans, side by side, and can be continued whenever the process was killed."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NUMBER = struct.Struct("<Q")


class PartFile:
    """The file while it grows.

    Behind its bytes stand the length of a span, and how much of each span is there. A number is written after the bytes
    that it counts, and cut off with the others once all are there.
    """

    def __init__(self, path: Path, size_bytes: int, span_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._divide(span_bytes)
        have = self._read() if path.exists() else None
        if have is None:
            self.restart(span_bytes)
        else:
            self._have = have

    def restart(self, span_bytes: int) -> None:
        """Forgets all bytes; from now on spans are that long."""
        self._divide(span_bytes)
        with self.path.open("wb") as file:
            file.seek(self.size_bytes)
            file.write(b"".join(map(NUMBER.pack, (span_bytes, *self._have))))

    def _divide(self, span_bytes: int) -> None:
        starts = range(0, self.size_bytes, span_bytes)
        self._span_bytes = span_bytes
        self._spans = [(start, min(start + span_bytes, self.size_bytes) - start) for start in starts]
        self._have = [0] * len(self._spans)

    def _read(self) -> list[int] | None:
        """Returns how much of each span is there, or None where that cannot be told."""
        lengths = [length for _, length in self._spans]
        if self.path.stat().st_size == self.size_bytes:
            return lengths
        with self.path.open("rb") as file:
            file.seek(self.size_bytes)
            behind = file.read(NUMBER.size * (2 + len(lengths)))
        if len(behind) != NUMBER.size * (1 + len(lengths)):
            return None
        span_bytes, *have = (number for (number,) in NUMBER.iter_unpack(behind))
        fit = all(number <= length for number, length in zip(have, lengths, strict=True))
        return have if fit and span_bytes == self._span_bytes else None

    @property
    def num_bytes(self) -> int:
        """How many bytes are there."""
        return sum(self._have)

    @property
    def num_spans(self) -> int:
        """How many spans there are."""
        return len(self._spans)

    def place(self, index: int) -> int:
        """Where the next byte of a span goes."""
        return self._spans[index][0] + self._have[index]

    def lacks(self, index: int) -> int:
        """How many bytes a span lacks."""
        return self._spans[index][1] - self._have[index]

    @contextmanager
    def appending(self, index: int) -> Iterator[Callable[[bytes], None]]:
        """Yields a function that writes the next bytes of a span."""
        with self.path.open("r+b") as data, self.path.open("r+b", buffering=0) as numbers:
            data.seek(self.place(index))

            def append(chunk: bytes) -> None:
                data.write(chunk)
                data.flush()
                self._have[index] += len(chunk)
                numbers.seek(self.size_bytes + NUMBER.size * (1 + index))
                numbers.write(NUMBER.pack(self._have[index]))

            yield append

    def close(self) -> str:
        """Returns the sha256 of the file, all of which is there, without what stood behind it."""
        with self.path.open("r+b") as file:
            file.truncate(self.size_bytes)
        return sha256_of(self.path)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
