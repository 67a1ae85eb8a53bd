"""Entities in sequences of tags, and their scores."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.scores import per_label

Entity = tuple[str, int, int]  # kind, first word, last word
Counts = NDArray[np.int64]  # right, predicted, labelled


def find_entities(tags: Sequence[str]) -> set[Entity]:
    """Returns the entities of a text in IOB2; an `I-` after another kind begins one, as in CoNLL's scorer."""
    found: set[Entity] = set()
    kind, first = "", 0
    for place, tag in enumerate([*tags, "O"]):
        head, _, name = tag.partition("-")
        if kind and (head != "I" or name != kind):
            found.add((kind, first, place - 1))
            kind = ""
        if head in {"B", "I"} and not kind:
            kind, first = name, place
    return found


def split_texts(tags_N: NDArray[np.int64], labels: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Yields the tags of each text."""
    start = 0
    for size in sizes:
        yield [labels[tag] for tag in tags_N[start : start + size]]
        start += size


def count_entities(labelled: Sequence[list[str]], predicted: Sequence[list[str]], kind: str | None = None) -> Counts:
    """Returns right, predicted and labelled entities of each text, counts_S3; of one kind, if it is named."""
    counts_S3 = np.zeros((len(labelled), 3), dtype=np.int64)
    for index, pair in enumerate(zip(labelled, predicted, strict=True)):
        wanted, given = ({e for e in find_entities(tags) if kind in {None, e[0]}} for tags in pair)
        counts_S3[index] = len(wanted & given), len(given), len(wanted)
    return counts_S3


def per_kind(labelled: Sequence[list[str]], predicted: Sequence[list[str]]) -> list[dict[str, Any]]:
    """Returns precision, recall, F1 and support of each kind of entity; a ratio with nothing below the line is 0."""
    kinds = sorted({entity[0] for tags in labelled for entity in find_entities(tags)})
    return [per_label(kind, count_entities(labelled, predicted, kind).sum(axis=0)) for kind in kinds]
