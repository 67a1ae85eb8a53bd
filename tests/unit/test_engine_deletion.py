"""Tokens that are left out, and how often the teacher answers for them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine_bench import FAST, Bench, make_spec
from worker.engine.data import Encoded
from worker.engine.teaching import AnswersOnline, Deletion
from worker.engine.words import Words

CPU = torch.device("cpu")


def test_what_is_left_out_changes_after_so_many_epochs() -> None:
    assert [Deletion(0.1, 2).drawing(epoch) for epoch in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [Deletion(0.1).drawing(epoch) for epoch in range(4)] == [0, 1, 2, 3]
    assert Deletion(0.0).drawing(3) == 0


def test_a_share_of_the_inner_tokens_goes_and_nothing_else() -> None:
    rows = [np.array([1, *range(10, 34), 2, *range(34, 58), 2], dtype=np.int32) for _ in range(200)]
    kinds = [(row > 33).astype(np.int32) for row in rows]
    split = Encoded({"input_ids": rows, "token_type_ids": kinds}, {}, torch.zeros(200, dtype=torch.int64), 64, 0, "")
    thinned, again, other = (split.thinned(0.1, [0, number]) for number in (1, 1, 2))
    left = thinned.columns["input_ids"]
    assert all(row[0] == 1 and row[-1] == 2 and (row == 2).sum() == 2 for row in left)  # both texts keep their ends
    assert 0.885 < sum(len(row) - 3 for row in left) / 9600 < 0.915  # five standard deviations to either side
    assert all((np.diff(row[(row != 2)]) > 0).all() for row in left)
    for row, kind in zip(left, thinned.columns["token_type_ids"], strict=True):
        assert (kind == (row > 33)).all()
    assert thinned.lengths.tolist() == [len(row) for row in left]
    assert [row.tolist() for row in again.columns["input_ids"]] == [row.tolist() for row in left]
    assert [row.tolist() for row in other.columns["input_ids"]] != [row.tolist() for row in left]


def test_words_that_stay_keep_their_labels() -> None:
    """Each word's number is its label and its first piece's id, and has a second piece where it is odd."""
    ids, places, numbers = [], [], []
    for text in range(50):
        row, found, words = [900], [], range(10 * text, 10 * text + 10)
        for word in words:
            found.append(len(row))
            row += [word, 800] if word % 2 else [word]
        ids.append(np.array([*row, 901], dtype=np.int32))
        places.append(np.array(found))
        numbers.append(np.array(words))
    split = Words({"input_ids": ids}, {"input_ids": 902}, torch.arange(500), 64, 0, "", places, numbers, [10] * 50)
    thinned = split.thinned(0.3, [7])
    batch = thinned.batch(np.arange(50), CPU)
    stayed = batch.rows >= 0
    assert batch.inputs["input_ids"][stayed].tolist() == batch.labels[stayed].tolist() == batch.rows[stayed].tolist()
    read = torch.tensor([i for row in thinned.columns["input_ids"] for i in row])
    assert sorted(batch.labels[stayed].tolist()) == sorted(read[read < 800].tolist())
    assert 300 < stayed.sum() < 400
    assert len(thinned.labels_N) == 500


@pytest.mark.parametrize(("deletion_epochs", "answers"), [(1, 5), (2, 3), (9, 2)])
def test_a_teacher_answers_once_for_each_drawing(tmp_path: Path, deletion_epochs: int, answers: int) -> None:
    stage = {"kind": "distill", **FAST, "epochs": 5, "deletion_probability": 0.3, "deletion_epochs": deletion_epochs}
    finished = Bench(tmp_path).lay().succeed(make_spec([stage]))
    assert finished.log.count("the teacher answered") == answers


def test_a_classifier_that_no_loss_hears_is_not_asked(tmp_path: Path) -> None:
    stage = {"kind": "distill", **FAST, "epochs": 3, "deletion_probability": 0.3, "losses": [{"kind": "cross_entropy"}]}
    finished = Bench(tmp_path).lay().succeed(make_spec([stage]))
    assert finished.log.count("the teacher answered") == 0
    assert finished.last["summary"]["teacher_validation"]["accuracy"] > 0  # which it is compared by


@pytest.mark.parametrize(("kinds", "is_heard"), [(["cross_entropy"], False), (["cross_entropy", "forward_kl"], True)])
def test_a_language_model_runs_only_for_a_loss_that_hears_it(
    kinds: list[str], is_heard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, times = AnswersOnline.answer, []
    monkeypatch.setattr(AnswersOnline, "answer", lambda *given: (times.append(1), run(*given))[1])
    stage = {"kind": "distill", "epochs": 1, "batch_size": 8, "losses": [{"kind": kind} for kind in kinds]}
    spec = make_spec([stage], task={"kind": "causal_lm", "block_tokens": 32})
    with Bench(tmp_path).lay_language().surround(spec, labels=[]) as ctx:
        summary = ctx.order.stage.build(ctx)()
    assert len(times) == (summary["num_steps"] if is_heard else 0)
