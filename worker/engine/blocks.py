"""Texts as one stream of tokens, in blocks of one length."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.data import Batch, read_rows, read_text, spread_rows

TOKENIZE_CHUNK = 1024
NOWHERE = -1
IS_CUT = "is_cut"  # column that is true of a text that was cut off: no end token comes after it
CPU = torch.device("cpu")


class Written(NamedTuple):
    """A text that a model wrote, and whether it was cut off before the model came to an end."""

    text: str
    is_cut: bool


@dataclass(frozen=True)
class Blocks:
    """A split as one stream of tokens, in blocks.

    Of a token that is to be predicted, `learned_S` is the number of those in its text; of others it is 0.
    """

    ids_S: NDArray[np.int32]
    learned_S: NDArray[np.int32]
    max_length: int
    num_cut: int = 0

    def __len__(self) -> int:
        return -(-self.num_places // self.max_length)

    @property
    def is_learned(self) -> NDArray[np.bool_]:
        """Which tokens are to be predicted, is_learned_S."""
        return self.learned_S > 0

    @property
    def num_places(self) -> int:
        """Tokens that another one follows."""
        return len(self.ids_S) - 1

    def batch(self, blocks: NDArray[np.int64], device: torch.device) -> Batch:
        """Returns these blocks; the label of a token is the next one, and its row is its place in the stream.

        The last block of the stream is filled up on the right, where causal attention does not look; so there is no
        attention mask, with which models would take slower kernels.
        """
        places_BT = blocks[:, None] * self.max_length + np.arange(self.max_length)
        is_there_BT = places_BT < self.num_places
        places_BT = np.where(is_there_BT, places_BT, 0)
        learned_BT = np.where(is_there_BT, self.learned_S[places_BT + 1], 0)
        seen = (self.ids_S[places].astype(np.int64) for places in (places_BT, places_BT + 1))
        ids_BT, labels_BT = (torch.from_numpy(ids) for ids in seen)
        rows_BT = torch.from_numpy(np.where(learned_BT > 0, places_BT, -1))
        is_there, in_text = torch.from_numpy(is_there_BT).to(device), torch.from_numpy(learned_BT)
        inputs = {"input_ids": ids_BT.to(device)}
        return Batch(inputs, labels_BT.to(device), rows_BT, is_there=is_there, in_text=in_text)

    def single(self, row: int) -> dict[str, Tensor]:
        """Returns the inputs of one block, a batch of one."""
        return self.batch(np.array([row]), CPU).inputs

    def shuffled(self, batch_size: int, seed: Sequence[int], first: int, device: torch.device) -> Iterator[Batch]:
        """Yields one epoch of batches from number `first` on; their order is a pure function of the seed."""
        order = np.random.default_rng(seed).permutation(len(self))
        for start in range(first * batch_size, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], device)

    def in_order(self, device: torch.device) -> Iterator[Batch]:
        """Yields every block once, one at a time, the last one as short as it is.

        Where activations are in few bits all of a block's would hear what fills it up.
        """
        for block in range(len(self)):
            yield self.batch(np.array([block]), device).head(self.num_places - block * self.max_length)

    def digest(self) -> str:
        """Returns what only the same stream in the same blocks has."""
        parts = (self.ids_S.tobytes(), self.is_learned.tobytes(), str(self.max_length).encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def count_ids(self) -> NDArray[np.int64]:
        """Returns how often each token occurs, up to the last one that does, counts_V."""
        return np.bincount(self.ids_S)

    def head(self, num_tokens: int) -> "Blocks":
        """Returns the first blocks of so many tokens, from the first one on that has a token to predict.

        They are shorter than these where one has more tokens than that: logits of all its tokens take memory.
        """
        length = min(self.max_length, num_tokens)
        start = int(np.flatnonzero(self.learned_S[1:])[0]) // length * length
        some = slice(start, start + num_tokens // length * length + 1)
        return Blocks(self.ids_S[some], self.learned_S[some], length, self.num_cut)

    def spread(self, num_tokens: int, max_length: int) -> "Blocks":
        """Returns blocks from all over the stream, of at most so many tokens together, and none longer than that."""
        length = min(self.max_length, max_length)
        if self.num_places <= num_tokens:
            return Blocks(self.ids_S, self.learned_S, length, self.num_cut)
        chosen_N = np.array(spread_rows(self.num_places // length, max(1, num_tokens // length)))
        places_NT = chosen_N[:, None] * length + np.arange(length)
        learned_NT = self.learned_S[places_NT]
        learned_NT[:, 0] = 0  # what comes before it is another block's end
        last = places_NT[-1, -1] + 1
        return Blocks(
            np.append(self.ids_S[places_NT], self.ids_S[last]),
            np.append(learned_NT, self.learned_S[last]),
            length,
            self.num_cut,
        )


def read_stream(
    path: Path, columns: dict[str, str], tokenizer: PreTrainedTokenizerBase, *, is_chat: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns the tokens of a split's texts, each with its prompt before it and, unless it is cut, the end token after.

    The second array is 0 of those that are not learned: the prompts, and what would come right after a cut text as if
    it went on there. Of each other one it is how many of its text are; the split's first token, which comes after
    nothing, is not counted. In a chat, prompt and text are what a user says and an assistant answers, in the form of
    the tokenizer's chat template.

    Raises:
        StageFailed: `dataset_invalid` with the line that does not fit, `spec_invalid` without such a template.
    """
    texts, prompts, are_cut = _read_columns(path, columns)
    ids: list[NDArray[np.int32]] = []
    learned: list[NDArray[np.int32]] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    follows_cut = False
    for start in range(0, len(texts), TOKENIZE_CHUNK):
        some = slice(start, start + TOKENIZE_CHUNK)
        if is_chat:
            pairs = [_read_chat(tokenizer, *pair) for pair in zip(prompts[some], texts[some], strict=True)]
        else:
            read = _tokenize(tokenizer, prompts[some], whole=True) if prompts else [[]] * len(texts[some])
            pairs = list(zip(read, _tokenize(tokenizer, texts[some], whole=not prompts), strict=True))
        for (prompt, text), is_cut in zip(pairs, are_cut[some], strict=True):
            body = text[:-1] if text[-1:] == end else text
            row = prompt + body if is_cut else prompt + body + end
            ids.append(np.array(row, dtype=np.int32))
            is_learned_T = np.arange(len(row)) >= max(len(prompt), int(follows_cut))
            num_learned = is_learned_T[int(len(ids) == 1) :].sum()
            learned.append(is_learned_T * np.int32(max(1, num_learned)))
            follows_cut = is_cut
    return np.concatenate(ids), np.concatenate(learned)


def read_starts(path: Path, columns: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Returns at which letter of the whole split each token of `read_stream` begins, spaces before it left out.

    The letters of all prompts and texts are counted through, with one more after each for its end. A token without
    letters, or whose first letter another one has begun, is nowhere.

    Raises:
        StageFailed: `spec_invalid` if the tokenizer cannot tell.
    """
    if not tokenizer.is_fast:
        hint = "Choose models whose folders have a tokenizer.json."
        raise StageFailed("spec_invalid", "A tokenizer does not tell which letters a token has.", suggestion=hint)
    texts, prompts, are_cut = _read_columns(path, columns)
    found: list[NDArray[np.int64]] = []
    letter = 0
    for start in range(0, len(texts), TOKENIZE_CHUNK):
        some = slice(start, start + TOKENIZE_CHUNK)
        pieces: list[tuple[list[str], bool, list[bool] | None]] = [(prompts[some], True, None)] if prompts else []
        pieces.append((texts[some], not prompts, are_cut[some]))
        read = [_tokenize_with_starts(tokenizer, *piece) for piece in pieces]
        for row in range(len(texts[some])):
            for (piece, _, _), starts in zip(pieces, read, strict=True):
                found.append(np.where(starts[row] == NOWHERE, NOWHERE, starts[row] + letter))
                letter += len(piece[row]) + 1
    return np.concatenate(found)


def _tokenize_with_starts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], whole: bool, are_cut: list[bool] | None
) -> list[NDArray[np.int64]]:
    """Returns where each token begins in its own text; the end token after one that is not cut at its end.

    `are_cut` is None of prompts, after which none comes.
    """
    read = tokenizer(texts, add_special_tokens=whole, truncation=False, return_offsets_mapping=True, verbose=False)
    found = []
    rows = zip(texts, read["input_ids"], read["offset_mapping"], are_cut or [True] * len(texts), strict=True)
    for text, ids, offsets, is_cut in rows:
        starts = [_first_letter(text, begin, end) if end > begin else NOWHERE for begin, end in offsets]
        if whole and _is_ended(ids, tokenizer):
            starts, ids = starts[:-1], ids[:-1]
        if are_cut is not None and tokenizer.eos_token_id is not None:
            body = starts[:-1] if ids[-1:] == [tokenizer.eos_token_id] else starts
            starts = body if is_cut else [*body, len(text)]
        starts_T = np.array(starts, dtype=np.int64)
        before_T = np.maximum.accumulate(np.concatenate([[NOWHERE], starts_T[:-1]]))
        found.append(np.where(starts_T > before_T, starts_T, NOWHERE))
    return found


def _first_letter(text: str, begin: int, end: int) -> int:
    return next((place for place in range(begin, end) if not text[place].isspace()), begin)


def count_bytes_of_texts(path: Path, columns: dict[str, str]) -> int:
    """Returns how many bytes the texts of a split have in UTF-8."""
    return sum(len(text.encode()) for text in _read_columns(path, columns)[0])


def read_prompts(
    path: Path, columns: dict[str, str], tokenizer: PreTrainedTokenizerBase, longest: int, *, is_chat: bool = False
) -> list[NDArray[np.int32]]:
    """Returns the tokens of each prompt of a split, or without prompts of the beginning of each text.

    Of a prompt the last `longest` tokens are taken, of a text at most the first half.

    Raises:
        StageFailed: As `read_stream` does.
    """
    texts, prompts, _ = _read_columns(path, columns)
    found = []
    for start in range(0, len(texts), TOKENIZE_CHUNK):
        some = slice(start, start + TOKENIZE_CHUNK)
        if is_chat:
            read = [_read_chat(tokenizer, *pair)[0] for pair in zip(prompts[some], texts[some], strict=True)]
        else:
            read = _tokenize(tokenizer, prompts[some] if prompts else texts[some], whole=True)
        found += [ids[-longest:] if prompts else ids[: min(longest, (len(ids) + 1) // 2)] for ids in read]
    return [np.array(ids, dtype=np.int32) for ids in found]


def _read_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Returns the tokens up to where the assistant begins, and its answer's up to its last end token."""
    if not tokenizer.chat_template:
        hint = "Set task.chat to false, or choose a model whose tokenizer has one."
        raise StageFailed("spec_invalid", "The tokenizer has no chat template.", suggestion=hint)
    asked = [{"role": "user", "content": prompt}]
    answered = [*asked, {"role": "assistant", "content": text}]
    read: list[int] = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    whole: list[int] = tokenizer.apply_chat_template(answered, return_dict=False)
    if whole[: len(read)] != read:
        what = "The chat template does not begin an answer as it begins one that is there, so its start is not known."
        raise StageFailed(
            "spec_invalid", what, suggestion="Set task.chat to false, and write prompts as they are read."
        )
    learned = whole[len(read) :]
    ends = [place for place, token in enumerate(learned) if token == tokenizer.eos_token_id]
    return read, learned[: ends[-1] + 1] if ends else learned


def _read_columns(path: Path, columns: dict[str, str]) -> tuple[list[str], list[str], list[bool]]:
    """Returns the texts, the prompts if there is a column of them, and which texts are cut."""
    rows = read_rows(
        path, lambda row: ({role: read_text(row, name) for role, name in columns.items()}, row.get(IS_CUT) is True)
    )
    prompts = [row["prompt"] for row, _ in rows if "prompt" in row]
    return [row["text"] for row, _ in rows], prompts, [is_cut for _, is_cut in rows]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, whole: bool) -> list[list[int]]:
    """Tokenises texts; `whole` ones get the tokenizer's own tokens around them, but for an end token.

    An end token comes once, after the text: `read_stream` sees to it.
    """
    found: list[list[int]] = tokenizer(texts, add_special_tokens=whole, truncation=False, verbose=False)["input_ids"]
    return [ids[:-1] if _is_ended(ids, tokenizer) else ids for ids in found] if whole else found


def _is_ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer put its end token after a text, and not only the same one before it."""
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
