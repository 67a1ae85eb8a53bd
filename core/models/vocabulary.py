"""Whether two tokenizers give the same tokens the same ids, which is what two language models must agree on."""

import json
from collections.abc import Mapping
from typing import Any


class VocabularyDiffers(Exception):
    """Two tokenizers give an id to different tokens."""


def count_common(teacher: Mapping[str, int], student: Mapping[str, int]) -> int:
    """Returns how many ids, from 0 on, both vocabularies have; they must give each to the same token.

    One may have more tokens than the other, after the common ones.

    Args:
        teacher: Ids by token.
        student: Ids by token.

    Raises:
        VocabularyDiffers: With the first id that means different tokens.
    """
    named = [{index: token for token, index in ids.items()} for ids in (teacher, student)]
    common = min(max(tokens, default=-1) + 1 for tokens in named)
    for index in range(common):
        first, second = (tokens.get(index) for tokens in named)
        if first != second:
            raise VocabularyDiffers(
                f"id {index} is {_quoted(first)} to the teacher's tokenizer and {_quoted(second)} to the student's"
            )
    return common


def read_vocabulary(tokenizer: bytes) -> dict[str, int]:
    """Returns ids by token of a `tokenizer.json`. Raises ValueError where it has no such list."""
    try:
        data: dict[str, Any] = json.loads(tokenizer)
        listed = data["model"]["vocab"]
        if isinstance(listed, list):  # Unigram has scores, in the order of the ids
            listed = {token: index for index, (token, _) in enumerate(listed)}
        return dict(listed) | {added["content"]: added["id"] for added in data.get("added_tokens", [])}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer.json has no vocabulary: {error}") from error


def _quoted(token: str | None) -> str:
    return "no token" if token is None else f"'{token[:40]}'"
