"""Masks that change after some epochs, and how often the teacher answers for them."""

from pathlib import Path

import pytest

from tests.engine_bench import FAST, Bench, make_spec
from worker.engine.teaching import Masking


def test_masks_change_after_so_many_epochs() -> None:
    assert [Masking(4, 0.1, 2).drawing(epoch) for epoch in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [Masking(4, 0.1).drawing(epoch) for epoch in range(4)] == [0, 1, 2, 3]
    assert {Masking(None, 0.1).drawing(3), Masking(4, 0.0).drawing(3)} == {0}


@pytest.mark.parametrize(("mask_epochs", "answers"), [(1, 5), (2, 3), (9, 2)])
def test_a_teacher_answers_once_for_each_drawing(tmp_path: Path, mask_epochs: int, answers: int) -> None:
    stage = {"kind": "distill", **FAST, "epochs": 5, "mask_probability": 0.3, "mask_epochs": mask_epochs}
    finished = Bench(tmp_path).lay().succeed(make_spec([stage]))
    assert finished.log.count("the teacher answered") == answers
