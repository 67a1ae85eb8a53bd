"""Whether two tokenizers give the same tokens the same ids, which is what two language models must agree on."""

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

Relation = Literal["identical", "padded", "different"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)  # from the best to the worst
FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
TEACHER_AND_STUDENT = ("the teacher's tokenizer", "the student's")


class VocabularyDiffers(Exception):
    """Two tokenizers give an id to different tokens."""


def count_common(
    first: Mapping[str, int], second: Mapping[str, int], names: tuple[str, str] = TEACHER_AND_STUDENT
) -> int:
    """Returns how many ids, from 0 on, both vocabularies have; they must give each to the same token.

    One may have more tokens than the other, after the common ones.

    Args:
        first: Ids by token.
        second: Ids by token.
        names: What an error calls the two.

    Raises:
        VocabularyDiffers: With the first id that means different tokens.
    """
    named = [{index: token for token, index in ids.items()} for ids in (first, second)]
    common = min(max(tokens, default=-1) + 1 for tokens in named)
    for index in sorted(index for index in named[0].keys() | named[1].keys() if index < common):
        one, other = (tokens.get(index) for tokens in named)
        if one != other:
            raise VocabularyDiffers(f"id {index} is {_quoted(one)} to {names[0]} and {_quoted(other)} to {names[1]}")
    return common


def relate(first: Mapping[str, int], second: Mapping[str, int], *num_logits: int) -> Relation:
    """Returns whether two vocabularies are the same, given the numbers of logits of their models.

    They are `padded` where tokens of one, or logits of a model, go on after what both have.
    """
    try:
        count_common(first, second)
    except VocabularyDiffers:
        return "different"
    sizes = {max(ids.values(), default=-1) + 1 for ids in (first, second)}
    return "identical" if len(sizes.union(num_logits)) == 1 else "padded"


def read_vocabulary(files: Mapping[str, bytes]) -> dict[str, int] | None:
    """Returns ids by token of a model's tokenizer.

    Args:
        files: Those of `FILES` that there are. Of the first three one counts, and tokens that were added to it.

    Returns:
        None of a tokenizer that is stored otherwise, as by SentencePiece.

    Raises:
        ValueError: The file has no such list.
    """
    name = next((name for name in FILES[:3] if name in files), None)
    if name is None:
        return None
    try:
        found = _read_whole(files[name]) if name == "tokenizer.json" else _read_list(name, files)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} has no vocabulary: {error}") from error
    odd = next((token for token, index in found.items() if type(index) is not int or index < 0), None)
    if odd is not None:
        raise ValueError(f"{name} gives the token '{odd[:40]}' an id that is no whole number from 0 on")
    return found


def _read_whole(tokenizer: bytes) -> dict[str, int]:
    data: dict[str, Any] = json.loads(tokenizer)
    listed = data["model"]["vocab"]
    if isinstance(listed, list):  # Unigram has scores, in the order of the ids
        listed = {token: index for index, (token, _) in enumerate(listed)}
    return dict(listed) | {added["content"]: added["id"] for added in data.get("added_tokens", [])}


def _read_list(name: str, files: Mapping[str, bytes]) -> dict[str, int]:
    if name == "vocab.txt":
        lines = files[name].decode().removesuffix("\n").split("\n")
        listed = {line.rstrip(): index for index, line in enumerate(lines)}
    else:
        listed = {**json.loads(files[name])}
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    added = {token["content"]: int(index) for index, token in config.get("added_tokens_decoder", {}).items()}
    return added | {**json.loads(files.get("added_tokens.json", b"{}"))} | listed


def _quoted(token: str | None) -> str:
    return "no token" if token is None else f"'{token[:40]}'"
