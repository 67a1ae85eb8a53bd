import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import StageFailed
from tests import pico
from worker.engine.data import Encoded, Examples, encode, read_examples, spread_rows
from worker.engine.loading import load_tokenizer
from worker.engine.words import Sentences

CPU = torch.device("cpu")
COLUMNS = {"text": "text", "label": "label"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tokenizer = load_tokenizer(pico.write_model(tmp_path_factory.mktemp("model")))
    rng = np.random.default_rng(0)
    texts = [" ".join(["late"] * int(rng.integers(1, 90))) for _ in range(101)]
    names = ["input_ids", "attention_mask"]
    return encode(Examples(texts, []), tokenizer, names, torch.arange(101) % 3)


@pytest.mark.parametrize(
    "labels", [["a"] * 900 + ["b"] * 60 + ["c"] * 2040, ["a", "b"] * 1500], ids=["sorted", "turns"]
)
def test_a_sample_has_the_labels_of_the_split_however_its_rows_lie(labels: list[str]) -> None:
    rows = spread_rows(len(labels), 1000)
    assert len({*rows}) == 1000
    assert rows == sorted(rows) == spread_rows(len(labels), 1000)
    found = Examples([str(number) for number in range(len(labels))], labels, None).take(rows)
    assert found.texts == [str(row) for row in rows]
    assert Sentences([[label] for label in labels], [[0]] * len(labels)).take(rows).words == [[x] for x in found.labels]
    for label in {*labels}:
        assert found.labels.count(label) / 1000 == pytest.approx(labels.count(label) / 3000, abs=0.05)
    assert spread_rows(7, 1000) == [*range(7)]


def test_long_texts_are_cut_and_counted(data: Encoded) -> None:
    assert data.lengths.max() == data.max_length == 64
    assert data.num_cut == sum(int(length) == 64 for length in data.lengths) - _exact(data)


def _exact(data: Encoded) -> int:
    rng = np.random.default_rng(0)
    return sum(int(rng.integers(1, 90)) == 62 for _ in range(101))


def test_an_epoch_holds_every_row_once_and_is_a_function_of_seed_and_epoch(data: Encoded) -> None:
    def rows(seed: int, epoch: int, first: int = 0) -> list[list[int]]:
        return [batch.rows.tolist() for batch in data.shuffled(8, [seed, epoch], first, CPU)]

    assert sorted(row for batch in rows(1, 0) for row in batch) == list(range(101))
    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0, 5) == rows(1, 0)[5:]
    assert rows(1, 0) != rows(1, 1)
    assert rows(1, 0) != rows(2, 0)
    assert len(rows(1, 0)) == 13


def test_batches_of_a_large_split_have_little_padding_and_those_of_a_small_one_mix_lengths() -> None:
    def widths_and_rows(num_rows: int, epoch: int) -> list[tuple[int, np.ndarray]]:
        rows = [np.zeros(length, dtype=np.int32) for length in np.random.default_rng(0).integers(3, 60, num_rows)]
        split = Encoded({"input_ids": rows}, {"input_ids": 0}, torch.zeros(num_rows), 64, 0, "")
        batches = split.shuffled(8, [epoch], 0, CPU)
        return [(batch.inputs["input_ids"].shape[1], split.lengths[batch.rows.numpy()]) for batch in batches]

    large = widths_and_rows(4000, 0)
    assert all(width % 2 == 0 for width, _ in large)
    assert sum(width * len(lengths) for width, lengths in large) < 1.1 * sum(lengths.sum() for _, lengths in large)
    small = [lengths for epoch in range(20) for _, lengths in widths_and_rows(24, epoch)]
    assert np.mean([np.ptp(lengths) for lengths in small]) > 40  # of 57: eight draws span 7/9 of the range on average


def test_padding_is_masked_and_rows_keep_their_labels(data: Encoded) -> None:
    for batch in data.by_length(8, CPU):
        for index, row in enumerate(batch.rows.tolist()):
            length = int(data.lengths[row])
            assert batch.inputs["attention_mask"][index].sum() == length
            assert (batch.inputs["input_ids"][index, length:] == 0).all()
            assert batch.inputs["input_ids"][index, :length].tolist() == data.columns["input_ids"][row].tolist()
            assert batch.labels[index] == row % 3


def test_by_length_starts_with_the_longest(data: Encoded) -> None:
    widths = [batch.inputs["input_ids"].shape[1] for batch in data.by_length(8, CPU)]
    assert widths == sorted(widths, reverse=True)


def test_rows_are_read_by_the_columns_of_the_task(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"body": "ü", "class": 1}) + "\n\n" + json.dumps({"body": "b", "class": "x"}) + "\n")
    assert read_examples(path, {"text": "body"}, lambda row: row["class"]) == Examples(["ü", "b"], [1, "x"])


@pytest.mark.parametrize(
    "line", ["{", '{"text": "a"}', '{"text": "a", "label": "c"}', "[1]", '{"text": null, "label": "b"}']
)
def test_a_row_that_does_not_fit_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n' + line + "\n")
    with pytest.raises(StageFailed, match=r"train\.jsonl, line 2") as caught:
        read_examples(path, COLUMNS, lambda row: {"b": 0}[row["label"]])
    assert caught.value.reason == "dataset_invalid"


def test_no_rows_are_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(StageFailed, match="has no rows"):
        read_examples(tmp_path / "test.jsonl", COLUMNS, dict)
