"""What the files of a tokenizer may say, hostile ones included."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from core.models.vocabulary import VocabularyDiffers, count_common, read_vocabulary


@pytest.mark.parametrize("index", [[1], 1.5, None, "x", -1, True])
def test_an_id_that_is_no_number_is_told(index: object) -> None:
    with pytest.raises(ValueError, match="'b' an id that is no whole number"):
        read_vocabulary({"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": index}}}).encode()})
    with pytest.raises(ValueError, match="'b' an id that is no whole number"):
        read_vocabulary({"vocab.json": json.dumps({"a": 0, "b": index}).encode()})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("tokenizer.json", c) for c in (b"[", b"{}", b'{"model": {"vocab": 1}}', b'{"model": {"vocab": [1]}}')],
        *[("vocab.json", c) for c in (b"{", b"[1]", b"7")],
        ("vocab.txt", b"a\nb\xff\n"),
    ],
)
def test_what_holds_no_vocabulary_is_told(name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=f"{name} has no vocabulary"):
        read_vocabulary({name: content})


FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
STORED = {
    "gpt2": {"vocab.json": '{"<|endoftext|>": 0, "b": 2, "a": 1}', "merges.txt": "#version: 0.2\n"},
    "bert": {"vocab.txt": "[PAD]\r\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\na\u2028b \nb"},
}
NEXT_IDS = {"gpt2": 3, "bert": 8}


@pytest.mark.parametrize("beside", [None, "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", STORED)
def test_a_list_of_tokens_is_read_as_stock_transformers_does(kind: str, beside: str | None, tmp_path: Path) -> None:
    index, files = NEXT_IDS[kind], dict(STORED[kind])
    if beside == "added_tokens.json":
        files[beside] = json.dumps({"<new>": index})
    elif beside:
        files[beside] = json.dumps({"added_tokens_decoder": {str(index): {"content": "<new>", **FLAGS}}})
    for name, content in (files | {"config.json": json.dumps({"model_type": kind})}).items():
        (tmp_path / name).write_bytes(content.encode())
    stock = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert read_vocabulary({name: content.encode() for name, content in files.items()}) == stock
    assert ("<new>" in stock) == bool(beside)


def test_a_tokenizer_of_another_form_is_not_known() -> None:
    assert read_vocabulary({"added_tokens.json": b"{}"}) is None


def test_a_huge_id_costs_no_more_than_a_small_one() -> None:
    huge = {"a": 0, "b": 10**15}
    assert count_common(huge, huge) == 10**15 + 1
    with pytest.raises(VocabularyDiffers, match="id 5 is 'c' to"):
        count_common(huge | {"c": 5}, huge)
