"""Our strict reader against the reference: what it accepts must load, and no mutation may crash it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from core.models.safetensors_header import read_tensors

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DTYPES = st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.bool_])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


@given(st.dictionaries(st.text(max_size=8), st.tuples(DTYPES, SHAPES), max_size=6))
@settings(deadline=None, max_examples=60)
def test_what_the_reference_writes_is_read(path: Path, tensors: dict) -> None:
    tensors.pop("__metadata__", None)
    path.write_bytes(save({name: np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items()}))
    assert {t.name: t.shape for t in read_tensors(path)} == {name: shape for name, (_, shape) in tensors.items()}


GOOD = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)})


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_a_mutation_is_refused_or_loads(path: Path, position: int, junk: bytes) -> None:
    data = GOOD[:position] + junk + GOOD[position + len(junk) :]
    path.write_bytes(data)
    try:
        read_tensors(path)
    except ValueError:
        return
    try:
        load(data)
    except (SafetensorError, KeyError) as error:
        pytest.fail(f"accepted, and the reference says {error}")


def test_too_many_tensors_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.models.safetensors_header.MAX_TENSORS", 1)
    path.write_bytes(GOOD)
    with pytest.raises(ValueError, match="at most 1 are accepted"):
        read_tensors(path)
