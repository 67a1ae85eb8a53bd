"""What a `tokenizer.json` may say, hostile ones included."""

import json

import pytest

from core.models.vocabulary import VocabularyDiffers, count_common, read_vocabulary


@pytest.mark.parametrize("index", [[1], 1.5, None, "x", -1, True])
def test_an_id_that_is_no_number_is_told(index: object) -> None:
    with pytest.raises(ValueError, match="'b' an id that is no whole number"):
        read_vocabulary(json.dumps({"model": {"vocab": {"a": 0, "b": index}}}).encode())


@pytest.mark.parametrize("content", [b"[", b"{}", b'{"model": {"vocab": 1}}', b'{"model": {"vocab": [1]}}'])
def test_what_holds_no_vocabulary_is_told(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        read_vocabulary(content)


def test_a_huge_id_costs_no_more_than_a_small_one() -> None:
    huge = {"a": 0, "b": 10**15}
    assert count_common(huge, huge) == 10**15 + 1
    with pytest.raises(VocabularyDiffers, match="id 5 is 'c' to"):
        count_common(huge | {"c": 5}, huge)
