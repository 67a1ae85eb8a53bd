"""Rows in several files, against numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from worker.engine.shards import Shards, shard_path

NUM_ROWS, SIZE = 23, 5


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, np.ndarray]:
    """What lies in five files, the last of which has fewer rows."""
    dice = np.random.default_rng(0)
    rows = {"classes": dice.integers(0, 99, (NUM_ROWS, 3), dtype=np.int32), "rest": dice.random(NUM_ROWS)}
    for number, start in enumerate(range(0, NUM_ROWS, SIZE)):
        some = {name: torch.from_numpy(x[start : start + SIZE].copy()) for name, x in rows.items()}
        save_file(some, shard_path(tmp_path, "answers", number))
    save_file({"rest": torch.zeros(1)}, tmp_path / "answers.safetensors")
    return rows


@pytest.mark.parametrize("wanted", [[], [7], [4, 5], [*range(NUM_ROWS)], [22, 0, 5, 4, 9, 10, 5, 21]], ids=len)
def test_rows_are_found_in_whichever_file_they_are(
    rows: dict[str, np.ndarray], wanted: list[int], tmp_path: Path
) -> None:
    shards = Shards(tmp_path, "answers")
    found = shards.read(["rest", "classes"], torch.tensor(wanted, dtype=torch.int64))
    for name, tensor in zip(["rest", "classes"], found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), rows[name][wanted], strict=True)
    assert (len(shards), shards.names) == (5, {"classes", "rest"})


def test_no_file_but_the_first_stays_in_memory(rows: dict[str, np.ndarray], tmp_path: Path) -> None:
    shards = Shards(tmp_path, "answers")
    [found] = shards.read(["rest"], torch.arange(NUM_ROWS))
    assert [kept["rest"].tolist() for kept in shards] == [part.tolist() for part in found.split(SIZE)]
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split()[-1]).name for line in lines if str(tmp_path) in line}
    assert mapped <= {"answers-00000.safetensors"}
