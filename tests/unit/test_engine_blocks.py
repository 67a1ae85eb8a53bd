"""Texts as one stream of tokens: what is predicted from what, and what is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from core.errors import StageFailed
from tests import pico
from worker.engine.blocks import NOWHERE, Blocks, read_prompts, read_starts, read_stream
from worker.engine.loading import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(pico.write_language_model(tmp_path_factory.mktemp("model")))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_closed_by_the_end_token_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "refund my money"}, {"text": "late <end>"}])
    ids, learned = read_stream(path, {"text": "text"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["refund", "my", "money", "<end>", "late", "<end>"]
    assert learned.all()


def test_prompts_are_read_and_not_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "train.jsonl", [{"q": "my parcel is", "a": "late"}, {"q": "refund", "a": "paid back"}])
    ids, learned = read_stream(path, {"text": "a", "prompt": "q"}, tokenizer)
    batch = Blocks(ids, learned, 64).batch(np.array([0]), CPU)
    pairs = [
        (tokenizer.convert_ids_to_tokens(int(seen)), tokenizer.convert_ids_to_tokens(int(label)))
        for seen, label in zip(batch.inputs["input_ids"][batch.is_row], batch.row_labels, strict=True)
    ]
    assert pairs == [("is", "late"), ("late", "<end>"), ("refund", "paid"), ("paid", "back"), ("back", "<end>")]


def load_closing_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that puts tokens of its own around a text, its end token among them."""
    tokenizer = load_tokenizer(pico.write_language_model(folder))
    around = [("<unk>", tokenizer.unk_token_id), ("<end>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <end>", special_tokens=around
    )
    return tokenizer


def test_a_prompt_is_not_ended(tmp_path: Path) -> None:
    tokenizer = load_closing_tokenizer(tmp_path / "model")
    path = write(tmp_path / "train.jsonl", [{"q": "my parcel is", "a": "late"}, {"q": "refund", "a": "paid"}])
    columns = {"text": "a", "prompt": "q"}
    ids, learned = read_stream(path, columns, tokenizer)
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<unk>", "my", "parcel", "is", "late", "<end>", "<unk>", "refund", "paid", "<end>"]
    assert len(read_starts(path, columns, tokenizer)) == len(ids) == len(learned)
    assert tokenizer.convert_ids_to_tokens(read_prompts(path, columns, tokenizer, 9)[0]) == words[:4]


def test_a_text_that_ends_in_the_end_token_is_closed_once_by_a_tokenizer_that_closes_texts(tmp_path: Path) -> None:
    tokenizer = load_closing_tokenizer(tmp_path / "model")
    path = write(tmp_path / "train.jsonl", [{"text": "late <end>"}, {"text": "refund"}])
    ids, _ = read_stream(path, {"text": "text"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<unk>", "late", "<end>", "<unk>", "refund", "<end>"]
    assert read_starts(path, {"text": "text"}, tokenizer).tolist() == [NOWHERE, 0, 10, NOWHERE, 11, 17]


def test_a_cut_text_has_no_end_and_nothing_is_learned_as_if_it_went_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"text": "refund my", "is_cut": True}, {"text": "late parcel", "is_cut": False}, {"text": "please <end>"}]
    path = write(tmp_path / "train.jsonl", [*rows, {"text": "money <end>", "is_cut": True}])
    ids, learned = read_stream(path, {"text": "text"}, tokenizer)
    tokens = np.array(tokenizer.convert_ids_to_tokens(ids))
    assert " ".join(tokens) == "refund my late parcel <end> please <end> money"
    assert " ".join(tokens[learned == 0]) == "late"
    assert read_starts(path, {"text": "text"}, tokenizer).tolist() == [0, 7, 10, 15, 21, 22, 34, 35]


def test_a_cut_text_is_learned_after_its_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"q": "my", "a": "late parcel", "is_cut": True}, {"q": "", "a": "paid back"}, {"q": "is", "a": "late"}]
    path, columns = write(tmp_path / "train.jsonl", rows), {"text": "a", "prompt": "q"}
    ids, learned = read_stream(path, columns, tokenizer)
    tokens = np.array(tokenizer.convert_ids_to_tokens(ids))
    assert " ".join(tokens) == "my late parcel paid back <end> is late <end>"
    assert " ".join(tokens[learned == 0]) == "my paid is"
    assert len(read_starts(path, columns, tokenizer)) == len(ids)


@pytest.mark.parametrize("length", [3, 64])
def test_the_rows_of_each_text_weigh_as_much_as_a_text(
    length: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Also where blocks cut it, and where its first token is not learned, as it follows nothing or a cut text."""
    rows = [{"text": "refund my money"}, {"text": "late"}, {"text": "my parcel is", "is_cut": True}]
    path = write(tmp_path / "train.jsonl", [*rows, {"text": "paid back"}])
    blocks = Blocks(*read_stream(path, {"text": "text"}, tokenizer), length)
    batch = blocks.batch(np.arange(len(blocks)), CPU)
    weights_S = torch.zeros(blocks.num_places + 1)
    weights_S[batch.row_numbers + 1] = batch.weights
    assert weights_S.tolist() == pytest.approx([0, *[1 / 3] * 3, *[1 / 2] * 2, *[1 / 3] * 3, 0, *[1 / 2] * 2])
    parts = [part.weights for part in batch.parts(1)]
    assert torch.cat(parts).tolist() == batch.weights.tolist()


def test_a_sample_begins_where_something_is_learned() -> None:
    ids = np.arange(41, dtype=np.int32)
    head = Blocks(ids, ids >= 25, 10).head(19)
    assert head.ids_S.tolist() == [*range(20, 31)]
    assert int(head.batch(np.array([0]), CPU).is_row.sum()) == 6  # the tokens 25 to 30
    assert Blocks(ids, ids >= 0, 10).head(20).ids_S.tolist() == [*range(21)]
    short = Blocks(ids, ids >= 25, 40).head(10)
    assert (short.ids_S.tolist(), short.max_length) == ([*range(20, 31)], 10)


def test_blocks_to_calibrate_with_are_of_all_the_stream() -> None:
    ids = np.arange(1000, dtype=np.int32)
    some = Blocks(ids, ids >= 0, 20).spread(100, 10)
    batches = [*some.in_order(CPU)]
    assert len(batches) == 10
    starts = [int(batch.inputs["input_ids"][0, 0]) for batch in batches]
    assert max(np.diff([-100, *starts, 1090])) <= 200  # one from each tenth of the stream
    for batch, start in zip(batches, starts, strict=True):
        assert batch.inputs["input_ids"].tolist() == [[*range(start, start + 10)]]
        assert batch.row_labels.tolist() == [*range(start + 1, start + 10 + (start == starts[-1]))]
    whole = Blocks(ids, ids >= 25, 20).spread(999, 10)
    assert (whole.ids_S.tolist(), whole.max_length) == (ids.tolist(), 10)


TEMPLATE = (
    "{% for m in messages %}{{ 'please ' if m.role == 'user' else 'the ' }}{{ m.content }}"
    "{{ ' and ' if m.role == 'user' else ' <end> now ' }}{% endfor %}"
    "{% if add_generation_prompt %}the {% endif %}"
)


def test_a_chat_is_read_by_the_template_and_the_answer_learned_to_its_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pico.write_language_model(tmp_path / "model"))
    tokenizer.chat_template = TEMPLATE
    path = write(tmp_path / "train.jsonl", [{"q": "refund", "a": "paid back"}, {"q": "my parcel", "a": "late"}])
    ids, learned = read_stream(path, {"text": "a", "prompt": "q"}, tokenizer, is_chat=True)
    tokens = np.array(tokenizer.convert_ids_to_tokens(ids))
    assert " ".join(tokens) == "please refund and the paid back <end> please my parcel and the late <end>"
    assert " ".join(tokens[learned > 0]) == "paid back <end> late <end>"


def test_a_cut_answer_of_a_chat_has_no_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pico.write_language_model(tmp_path / "model"))
    tokenizer.chat_template = TEMPLATE
    rows = [{"q": "refund", "a": "paid back", "is_cut": True}, {"q": "my parcel", "a": "late"}]
    path = write(tmp_path / "train.jsonl", rows)
    ids, learned = read_stream(path, {"text": "a", "prompt": "q"}, tokenizer, is_chat=True)
    tokens = np.array(tokenizer.convert_ids_to_tokens(ids))
    assert " ".join(tokens) == "please refund and the paid back please my parcel and the late <end>"
    assert " ".join(tokens[learned > 0]) == "paid back late <end>"


@pytest.mark.parametrize(
    ("template", "what"),
    [(None, "no chat template"), (TEMPLATE.replace("%}the {%", "%}help {%"), "does not begin an answer")],
)
def test_a_tokenizer_that_cannot_chat_is_told(tmp_path: Path, template: str | None, what: str) -> None:
    tokenizer = load_tokenizer(pico.write_language_model(tmp_path / "model"))
    tokenizer.chat_template = template
    path = write(tmp_path / "train.jsonl", [{"q": "refund", "a": "paid back"}])
    with pytest.raises(StageFailed, match=what) as caught:
        read_stream(path, {"text": "a", "prompt": "q"}, tokenizer, is_chat=True)
    assert caught.value.reason == "spec_invalid"


@pytest.mark.parametrize("num_tokens", [2, 9, 16, 17, 18, 100])
def test_every_token_but_the_first_is_predicted_once_from_the_one_before(num_tokens: int) -> None:
    ids = np.arange(1000, 1000 + num_tokens, dtype=np.int32)
    split = Blocks(ids, np.ones(num_tokens, dtype=bool), 8)
    labels, rows = [], []
    for batch in split.in_order(CPU):
        assert batch.inputs["input_ids"].shape == batch.rows.shape == (1, min(8, num_tokens - 1 - len(rows)))
        assert batch.is_token.all()
        is_row = batch.is_row
        assert (batch.labels[is_row] == batch.inputs["input_ids"][is_row] + 1).all()
        labels += batch.row_labels.tolist()
        rows += batch.row_numbers.tolist()
    assert labels == ids[1:].tolist()
    assert rows == list(range(num_tokens - 1))
    assert len(split) == -(-(num_tokens - 1) // 8)


def test_an_epoch_holds_every_block_once_and_is_a_function_of_the_seed() -> None:
    split = Blocks(np.arange(101, dtype=np.int32), np.ones(101, dtype=bool), 8)

    def rows(seed: int, first: int = 0) -> list[list[int]]:
        return [batch.row_numbers.tolist() for batch in split.shuffled(4, [seed], first, CPU)]

    assert sorted(row for batch in rows(1) for row in batch) == list(range(100))
    assert rows(1) == rows(1)
    assert rows(1, 2) == rows(1)[2:]
    assert rows(1) != rows(2)


def test_only_the_same_stream_in_the_same_blocks_has_its_digest() -> None:
    ids, learned = np.arange(50, dtype=np.int32), np.ones(50, dtype=bool)
    masked = learned.copy()
    masked[3] = False
    digests = {Blocks(ids, learned, 8).digest(), Blocks(ids, learned, 16).digest(), Blocks(ids, masked, 8).digest()}
    assert len(digests | {Blocks(ids[:-1], learned[:-1], 8).digest()}) == 4
    assert Blocks(ids.copy(), learned.copy(), 8).digest() in digests


@pytest.mark.parametrize("line", ["{", '{"other": "a"}', "[1]", '{"text": null}'])
def test_a_row_that_does_not_fit_names_its_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "late"}\n' + line + "\n")
    with pytest.raises(StageFailed, match=r"train\.jsonl, line 2") as caught:
        read_stream(path, {"text": "text"}, tokenizer)
    assert caught.value.reason == "dataset_invalid"
