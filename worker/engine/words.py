"""Texts as words with a tag each, tokenised once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from worker.engine.data import TOKENIZE_CHUNK, Batch, Encoded, pad_values, read_rows


class Sentences(NamedTuple):
    """The words of each text of a split, and their tags as indices into the job's labels."""

    words: list[list[str]]
    tags: list[list[int]]

    @property
    def num_texts(self) -> int:
        """The number of texts."""
        return len(self.words)

    def part(self, start: int, end: int) -> "Sentences":
        """Returns some of the texts."""
        return Sentences(self.words[start:end], self.tags[start:end])

    def take(self, rows: Sequence[int]) -> "Sentences":
        """Returns the texts of these numbers."""
        return Sentences([self.words[row] for row in rows], [self.tags[row] for row in rows])


@dataclass(frozen=True)
class Words(Encoded):
    """A tokenised split whose rows are words.

    Of each text, `places` are where a word's first piece stands, and `numbers` the rows of these words. A word that was
    cut off, or of which the tokenizer makes nothing, has a row that no batch has.
    """

    places: list[NDArray[np.int64]]
    numbers: list[NDArray[np.int64]]
    sizes: list[int]

    def only(self, stays: Sequence[NDArray[np.bool_]]) -> Self:
        """Returns the split with the tokens of each text that stay, and the words whose first piece does."""
        places, numbers = [], []
        for stays_T, places_W, numbers_W in zip(stays, self.places, self.numbers, strict=True):
            stays_W = stays_T[places_W]
            places.append((stays_T.cumsum() - 1)[places_W[stays_W]])
            numbers.append(numbers_W[stays_W])
        return replace(super().only(stays), places=places, numbers=numbers)

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> Batch:
        """Returns these texts, with a label at the first piece of each word."""
        inputs = super().batch(rows, device).inputs
        labels_BT = torch.zeros(inputs["input_ids"].shape, dtype=torch.int64)
        numbers_BT = torch.full_like(labels_BT, -1)
        for index, row in enumerate(rows):
            places, numbers = (torch.from_numpy(found[row]) for found in (self.places, self.numbers))
            labels_BT[index, places], numbers_BT[index, places] = self.labels_N[numbers], numbers
        return Batch(inputs, labels_BT.to(device), numbers_BT)


def read_sentences(path: Path, columns: dict[str, str], labels: list[str]) -> Sentences:
    """Returns the sentences of a JSON Lines file. Raises StageFailed naming the line that does not fit."""
    index_of = {label: index for index, label in enumerate(labels)}

    def read(row: dict[str, Any]) -> tuple[list[str], list[int]]:
        words, tags = [str(word) for word in row[columns["tokens"]]], [index_of[tag] for tag in row[columns["tags"]]]
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words have {len(tags)} tags")
        return words, tags

    rows = read_rows(path, read)
    return Sentences([words for words, _ in rows], [tags for _, tags in rows])


def read_after_space(tokenizer: PreTrainedTokenizerBase) -> None:
    """Has a byte-level tokenizer read each word as one that stands after a space, now and when it is loaded again."""
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if getattr(tokenizer, "add_prefix_space", None) is not False or split is None:
        return
    state = json.loads(split.__getstate__())
    bytewise = [part for part in state.get("pretokenizers", [state]) if part["type"] == "ByteLevel"]
    for part in bytewise:
        part["add_prefix_space"] = True
    split.__setstate__(json.dumps(state).encode())
    tokenizer.backend_tokenizer.pre_tokenizer = split
    if bytewise:
        tokenizer.add_prefix_space = True


def encode_words(sentences: Sentences, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Words:
    """Returns the split tokenised, each text cut at the tokenizer's `model_max_length`."""
    limit = tokenizer.model_max_length
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    places: list[NDArray[np.int64]] = []
    numbers: list[NDArray[np.int64]] = []
    num_cut = first = 0
    for start in range(0, len(sentences.words), TOKENIZE_CHUNK):
        some = sentences.words[start : start + TOKENIZE_CHUNK]
        chunk: Any = tokenizer(some, is_split_into_words=True, truncation=True, max_length=limit)
        for name in names:
            columns[name] += [np.array(ids, dtype=np.int32) for ids in chunk[name]]
        for index, words in enumerate(some):
            found = _first_pieces(chunk.word_ids(index))
            places.append(np.array(list(found.values()), dtype=np.int64))
            numbers.append(first + np.array(list(found), dtype=np.int64))
            num_cut += bool(chunk.encodings[index].overflowing)
            first += len(words)
    sizes = [len(words) for words in sentences.words]
    tags_N = labels_of(sentences)
    return Words(
        columns, pad_values(tokenizer, names), tags_N, limit, num_cut, digest_of(sentences), places, numbers, sizes
    )


def _first_pieces(word_ids: list[int | None]) -> dict[int, int]:
    """Returns the place of the first piece of each word that has one."""
    found: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            found.setdefault(word, place)
    return found


def digest_of(sentences: Sentences) -> str:
    """Returns the sha256 of the words, in their order."""
    return hashlib.sha256(json.dumps(sentences.words).encode()).hexdigest()


def labels_of(sentences: Sentences) -> Tensor:
    """Returns the tag of every word, labels_N."""
    return torch.tensor([tag for tags in sentences.tags for tag in tags], dtype=torch.int64)
