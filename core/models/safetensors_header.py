"""A strict reader of safetensors headers; it needs no tensor library and trusts no length that it has not checked.

Format: 8 bytes little-endian header length, a JSON object, then the tensors' bytes without a gap.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 100_000
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    "F4": 4,
}


class Tensor(NamedTuple):
    """A tensor's name, type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Returns how many numbers the tensor holds."""
        return math.prod(self.shape)


def read_tensors(path: Path) -> list[Tensor]:
    """Returns the tensors that a file declares. Raises ValueError, saying what is wrong, unless the file is exact."""
    header, _, num_bytes = _read_header(path)
    entries = sorted((_entry(name, value) for name, value in header.items()), key=lambda entry: entry[1:])
    _check_cover(entries, num_bytes)
    return [tensor for tensor, _, _ in entries]


def read_metadata(path: Path) -> dict[str, str]:
    """Returns what a file says besides its tensors. Raises ValueError, saying what is wrong with its header."""
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Returns what a file says of its tensors and besides, and how many bytes come after that."""
    size = path.stat().st_size
    with path.open("rb") as source:
        start = source.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise ValueError("the first 8 bytes give no possible header length, so this is no safetensors file")
        raw = source.read(length)
    header = _parse(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("'__metadata__' must map names to strings")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors; at most {MAX_TENSORS:,} are accepted")
    return header, metadata, size - 8 - length


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise ValueError("the header does not start with '{', so this is no safetensors file")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is no valid JSON: {str(error)[:100]}") from error
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(name: str, value: Any) -> tuple[Tensor, int, int]:
    shown = name[:80]
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor '{shown}' must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor '{shown}' has the unknown dtype {str(dtype)[:40]}")
    if not _naturals(shape) or len(shape) > 64:
        raise ValueError(f"tensor '{shown}' has an impossible shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor '{shown}' has impossible data_offsets")
    tensor = Tensor(name, dtype, tuple(shape))
    if tensor.num_elements * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"tensor '{shown}' has another size than its shape and dtype say")
    return tensor, offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(entries: list[tuple[Tensor, int, int]], data_bytes: int) -> None:
    position = 0
    for tensor, begin, end in entries:
        if begin != position:
            raise ValueError(f"tensor '{tensor.name[:80]}' leaves a gap or overlaps another")
        position = end
    if position != data_bytes:
        raise ValueError(f"the tensors cover {position:,} bytes and the file holds {data_bytes:,}; it may be cut off")
