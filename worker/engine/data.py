"""Texts and labels, tokenised once, in batches of texts of nearly one length."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import StageFailed

LENGTH_MULTIPLE = 2
GROUP_BATCHES = 50
TOKENIZE_CHUNK = 4096
NO_ROWS = "Give the model a row for each token of its tokenizer (`resize_token_embeddings`), and upload it again."
T = TypeVar("T")


class Examples(NamedTuple):
    """The texts of a split, second texts if it has pairs, and what is to be found of each: as a class, its index."""

    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None

    @property
    def num_texts(self) -> int:
        """The number of examples."""
        return len(self.texts)

    def part(self, start: int, end: int) -> "Examples":
        """Returns some of the examples."""
        return Examples(self.texts[start:end], self.labels[start:end], self.pairs and self.pairs[start:end])

    def take(self, rows: Sequence[int]) -> "Examples":
        """Returns the examples of these numbers."""
        pairs = self.pairs and [self.pairs[row] for row in rows]
        return Examples([self.texts[row] for row in rows], [self.labels[row] for row in rows], pairs)

    def prompts(self, prompt: str, **values: str) -> list[str]:
        """Returns a prompt for each example, with its texts for `{text}` and `{pair}`, and the values for their names.

        A text that holds such a mark is taken as it is.
        """
        rows = zip(self.texts, self.pairs or [""] * len(self.texts), strict=True)
        return [fill(prompt, {**values, "text": text, "pair": pair}) for text, pair in rows]


def spread_rows(total: int, count: int) -> list[int]:
    """Returns the numbers of so many rows, or of all if they are fewer, the same ones each time.

    It is one from each of so many stretches of one length, anywhere in it: rows may be sorted, or come in turns.
    """
    if total <= count:
        return [*range(total)]
    places = np.random.default_rng(0).random(count)
    rows: list[int] = ((np.arange(count) + places) * (total / count)).astype(np.int64).tolist()
    return rows


def fill(prompt: str, values: dict[str, str]) -> str:
    """Returns the prompt with values in place of `{name}`; another name in braces stays."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), prompt)


class Batch(NamedTuple):
    """Inputs `{name: ids_BT}`, and what is to be found: a class or a value an example, or a class a token or a label.

    `labels` is labels_B, labels_BT or labels_BC. `rows`, of the same shape and on the processor, is the number that
    each row has in the whole split, and -1 where there is none. One that does not count is there because another
    process has one at that moment; it has no rows. Of several tasks it is about one, whose models give numbers or not.
    `is_there`, is_there_BT, says where a token is if the inputs have no attention mask that does. `in_text`, in_text_BT
    on the processor, is how many rows there are in the text of each row, if texts are not examples.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: Tensor
    counts: bool = True
    task: str = ""
    gives_values: bool | None = None
    is_there: Tensor | None = None
    in_text: Tensor | None = None

    @property
    def is_row(self) -> Tensor:
        """Where something is to be found."""
        return (self.rows >= 0).to(self.labels.device)

    @property
    def is_token(self) -> Tensor:
        """Where a token is, and not what only fills the batch up, is_token_BT."""
        return mask_of(self.inputs) if self.is_there is None else self.is_there

    @property
    def row_labels(self) -> Tensor:
        """What is to be found of the rows."""
        return self.labels[self.is_row]

    @property
    def row_numbers(self) -> Tensor:
        """The numbers of the rows."""
        return self.rows[self.rows >= 0]

    @property
    def weights(self) -> Tensor:
        """How much each row counts if all texts count alike, weight_N: the rows of a whole text together are 1."""
        is_row = self.rows >= 0
        if self.in_text is not None:
            return 1 / self.in_text[is_row]
        num_rows_B = is_row.flatten(1).sum(dim=1) if is_row.dim() > 1 else is_row.long()
        return 1 / num_rows_B.repeat_interleave(num_rows_B)

    def row_logits(self, logits: Tensor) -> Tensor:
        """Returns the rows of what a model answers, logits_NC.

        Where it answers a row with a single number z, as whether a label fits, these are 0 for no and z for yes, whose
        softmax is the sigmoid of z.
        """
        found = logits[(self.rows >= 0).to(logits.device)]
        return found if found.dim() > 1 else torch.stack([torch.zeros_like(found), found], dim=-1)

    def _take(self, some: slice | tuple[slice, slice]) -> "Batch":
        inputs = {name: ids_BT[some] for name, ids_BT in self.inputs.items()}
        known = {"is_there": self.is_there, "in_text": self.in_text}
        others: dict[str, Any] = {name: x_BT[some] for name, x_BT in known.items() if x_BT is not None}
        return self._replace(inputs=inputs, labels=self.labels[some], rows=self.rows[some], **others)

    def head(self, num_tokens: int) -> "Batch":
        """Returns the first so many tokens of each sequence, or all of them, of a batch whose rows are tokens."""
        return self._take((slice(None), slice(num_tokens)))

    def without_rows(self) -> "Batch":
        """Returns the same inputs, of which nothing counts."""
        return self._replace(rows=torch.full_like(self.rows, -1), counts=False)

    def parts(self, size: int, number: int = 0, count: int = 1) -> Iterator["Batch"]:
        """Yields one of so many equal shares of the examples, in parts of at most `size`.

        Each share has as many parts: where the examples do not suffice, the first one comes again and does not count.
        """
        share = -(-len(self.rows) // count)
        end = min((number + 1) * share, len(self.rows))
        for start in range(number * share, (number + 1) * share, size):
            some = slice(start, min(start + size, end))
            yield self._take(some) if start < end else self._take(slice(0, 1)).without_rows()


def mask_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns where the inputs say that a token is, mask_BT."""
    mask_BT = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: for each input name, one array of ids an example."""

    columns: dict[str, list[np.ndarray]]
    pad_values: dict[str, int]
    labels_N: Tensor
    max_length: int
    num_cut: int
    texts_sha256: str

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def num_rows(self) -> int:
        """Places where something is to be found, one a text."""
        return len(self.labels_N)

    def digest(self) -> str:
        """Returns the sha256 of the texts, however they are read."""
        return self.texts_sha256

    def count_ids(self) -> np.ndarray:
        """Returns how often each token occurs, up to the last one that does, counts_V."""
        return np.bincount(np.concatenate(self.columns["input_ids"]))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, lengths_N."""
        return np.array([len(ids) for ids in self.columns["input_ids"]], dtype=np.int64)

    def batch(self, rows: np.ndarray, device: torch.device) -> Batch:
        """Returns these rows, padded on the right to an even number of tokens, on the device."""
        longest = max(len(self.columns["input_ids"][row]) for row in rows)
        width = max(longest, min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.max_length))
        inputs = {}
        for name, column in self.columns.items():
            ids_BT = np.full((len(rows), width), self.pad_values[name], dtype=np.int64)
            for index, row in enumerate(rows):
                ids_BT[index, : len(column[row])] = column[row]
            inputs[name] = torch.from_numpy(ids_BT).to(device)
        rows_B = torch.from_numpy(rows)
        return Batch(inputs, self.labels_N[rows_B].to(device), rows_B)

    def single(self, row: int) -> dict[str, Tensor]:
        """Returns the inputs of one example, a batch of one without padding."""
        return {name: torch.from_numpy(column[row].astype(np.int64)[None]) for name, column in self.columns.items()}

    def shuffled(self, batch_size: int, seed: Sequence[int], first: int, device: torch.device) -> Iterator[Batch]:
        """Yields one epoch of batches from number `first` on; their order is a pure function of the seed.

        Rows are drawn in groups of up to 50 batches, and each group is cut into batches of rows of nearly one length.
        A group is at most a quarter of the split: batches of one length are no fair draws, and cut from the whole of a
        small split they would be the same ones in every epoch.
        """
        rng = np.random.default_rng(seed)
        order, lengths = rng.permutation(len(self)), self.lengths
        size = batch_size * max(1, min(GROUP_BATCHES, len(self) // (4 * batch_size)))
        groups = np.split(order, range(size, len(order), size))
        order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in groups])
        starts = np.arange(0, len(order), batch_size)
        for start in rng.permutation(starts)[first:]:
            yield self.batch(order[start : start + batch_size], device)

    def thinned(self, probability: float, seed: Sequence[int]) -> Self:
        """Returns the split without some tokens: each but the first and last of a text goes with this probability.

        Tokens that are the last one's like stay as well, as that between two texts.
        """
        rng = np.random.default_rng(seed)
        stays = [(rng.random(len(ids)) >= probability) | (ids == ids[-1]) for ids in self.columns["input_ids"]]
        for stays_T in stays:
            stays_T[0] = True
        return self.only(stays)

    def only(self, stays: Sequence[NDArray[np.bool_]]) -> Self:
        """Returns the split with the tokens of each text that stay, stays_T."""
        pairs = {name: zip(rows, stays, strict=True) for name, rows in self.columns.items()}
        return replace(self, columns={name: [ids[stays_T] for ids, stays_T in rows] for name, rows in pairs.items()})

    def by_length(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yields every row once, the longest first, so that the largest batch fails first if memory is short."""
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], device)


def read_rows(path: Path, read: Callable[[dict[str, Any]], T]) -> list[T]:
    """Returns what `read` makes of each row of a JSON Lines file.

    Raises:
        StageFailed: `dataset_invalid` with the line of which `read` raises ValueError, KeyError or TypeError.
    """
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found.append(read(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                message = f"{path.name}, line {number}: {type(error).__name__} {error}"
                raise StageFailed("dataset_invalid", message) from error
    if not found:
        raise StageFailed("dataset_invalid", f"{path.name} has no rows.")
    return found


def read_examples(path: Path, columns: dict[str, str], read_label: Callable[[dict[str, Any]], Any]) -> Examples:
    """Returns the examples of a JSON Lines file. Raises StageFailed naming the line that does not fit.

    Args:
        path: The file.
        columns: The columns by role.
        read_label: Gives what is to be found of a row; may raise ValueError, KeyError or TypeError.
    """
    names = [columns[role] for role in ("text", "pair") if role in columns]
    rows = read_rows(path, lambda row: ([read_text(row, name) for name in names], read_label(row)))
    texts, *pairs = ([found[place] for found, _ in rows] for place in range(len(names)))
    return Examples(texts, [label for _, label in rows], pairs[0] if pairs else None)


def read_text(row: dict[str, Any], name: str) -> str:
    """Returns the text in a column of a row. Raises TypeError for anything else."""
    found = row[name]
    if not isinstance(found, str):
        raise TypeError(f"found {found!r:.100} in '{name}', not a text")
    return found


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, names: list[str], labels_N: Tensor) -> Encoded:
    """Returns the split tokenised, each text cut at the tokenizer's `model_max_length`; `labels_N` are of its rows."""
    limit = tokenizer.model_max_length
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    num_cut = 0
    for start in range(0, len(examples.texts), TOKENIZE_CHUNK):
        some = slice(start, start + TOKENIZE_CHUNK)
        chunk = tokenizer(
            examples.texts[some],
            examples.pairs and examples.pairs[some],
            truncation=True,
            max_length=limit,
            padding=False,
            return_attention_mask=True,
        )
        num_cut += sum(bool(encoding.overflowing) for encoding in chunk.encodings or [])
        for name in names:
            columns[name] += [np.array(ids, dtype=np.int32) for ids in chunk[name]]
    return Encoded(columns, pad_values(tokenizer, names), labels_N, limit, num_cut, digest(examples))


def check_tokens(
    counts_V: NDArray[Any],
    num_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    model: str,
    hint: str = NO_ROWS,
) -> None:
    """Raises StageFailed: `vocab_incompatible` if a split has a token that a model lacks, which has the first so many.

    Args:
        counts_V: How often each token occurs, up to the last one that does.
        num_tokens: How many the model has.
        tokenizer: What calls it by its name.
        split: The split's name.
        model: What the message calls the model.
        hint: What to do.
    """
    if len(counts_V) > num_tokens:
        token = tokenizer.convert_ids_to_tokens(len(counts_V) - 1)
        message = f"The {split} split has the token '{token}', which the {model} lacks."
        raise StageFailed("vocab_incompatible", message, suggestion=hint)


def check_padding(num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StageFailed: `vocab_incompatible` if a model with the first so many tokens lacks what fills texts up."""
    if (tokenizer.pad_token_id or 0) >= num_tokens:
        message = f"Texts are filled up with the token '{tokenizer.pad_token}', which the model lacks."
        raise StageFailed("vocab_incompatible", message, suggestion=NO_ROWS)


def pad_values(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> dict[str, int]:
    """Returns what inputs of these names are filled up with."""
    pads = {
        "input_ids": tokenizer.pad_token_id or 0,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    return {name: pads[name] for name in names}


def digest(examples: Examples) -> str:
    """Returns the sha256 of the texts, in their order."""
    return hashlib.sha256(json.dumps([examples.texts, examples.pairs]).encode()).hexdigest()
