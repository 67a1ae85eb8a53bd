"""The teacher's answers to the training split, kept for later."""

import json
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from core.errors import StageFailed
from worker.engine import ranks, shards
from worker.engine.blocks import Blocks
from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.devices import autocast
from worker.engine.failures import CheckpointUnfit, StopRequested
from worker.engine.keeping import Recorder
from worker.engine.measuring import count_bytes
from worker.engine.sharding import is_sharded
from worker.engine.teaching import ANSWERS, ANSWERS_FILE
from worker.kernels.heads import Head, rows_at_once
from worker.kernels.mixtures import Mixture
from worker.kernels.signals import SampledSignal, SparseSignal

if TYPE_CHECKING:
    from worker.methods.stages.answer import Answer

Tensors = dict[str, Tensor]
Hear = Callable[[Batch], Head | Mixture | Tensor]
PIECE_TEXTS = 512
log = logging.getLogger(__name__)


def answer(ctx: StageContext, settings: "Answer") -> dict[str, Any]:
    """Has the teacher answer, and writes what it says.

    `answers.safetensors` holds a classifier's `logits` (and as `test` those of the test split), or of a language model
    `num_classes`, the tokens among which it chose (and as `test` its sums over each block of the test split); what
    `keep_likeliest` writes is beside it. Its metadata hold, as JSON under `about`, the digest of the split, the
    temperature, the teacher's scores on the validation split, and what became of the rest. What was asked for of the
    teacher's layers is beside it, too (`worker/engine/keeping.py`).
    """
    if settings.rest == "dropped":
        ctx.warn(
            "answers_renormalised", "The other tokens are left out, so that the student will be too sure of these."
        )
    kept = ctx.task.keep(settings)
    if ranks.number():
        return {}  # the first process has it all
    folder = ctx.output("answers")
    about = {"split": kept.split, "temperature": settings.temperature, "scores": kept.scores, "rest": settings.rest}
    metadata = {"about": json.dumps(about, sort_keys=True)}  # one value, as the library shuffles keys
    save_file(kept.tensors, folder / ANSWERS_FILE, metadata=metadata)
    size_bytes = count_bytes(folder)
    sizes = {"size_bytes": size_bytes, "bytes_per_row": round(size_bytes / kept.num_rows, 2)}
    return {**kept.summary, **sizes, "teacher_validation": kept.scores}


class Piece(NamedTuple):
    """Texts of a split that are answered together."""

    split: str
    start: int
    end: int


def answer_texts(
    ctx: StageContext,
    speak: Callable[[Any, int], Tensor],
    splits: dict[str, Any],
    max_length: int,
    recorder: Recorder | None = None,
) -> Tensors:
    """Returns what a teacher of labels says of each split, logits_NC; `recorder` keeps its layers, if that is wanted.

    It answers so many texts at a time, always the same ones together, so that an interruption changes nothing. An API
    is asked for whole splits: each of its answers is kept by itself.

    Raises:
        StopRequested: After handing over a checkpoint; a run that goes on from it asks only for what is left.
    """
    size = sys.maxsize if ctx.spec.teacher.api() else PIECE_TEXTS
    pieces = [
        Piece(split, start, min(start + size, texts.num_texts))
        for split, texts in splits.items()
        for start in range(0, texts.num_texts, size)
    ]
    found: dict[str, list[Tensor]] = {split: [] for split in splits}

    def fill(done: int, tensors: Tensors) -> None:
        for split in {piece.split for piece in pieces[:done]}:
            found[split].append(tensors[split])
        _copy(_layers_of(pieces[:done], recorder), tensors)

    done = _restore(ctx, fill)
    if done:
        log.info("going on from text %d of %s", pieces[done - 1].end, pieces[done - 1].split)
    num_done, total = (sum(piece.end - piece.start for piece in some) for some in (pieces[:done], pieces))
    try:
        for number, (split, start, end) in enumerate(pieces[done:], done):
            found[split].append(speak(splits[split].part(start, end), max_length))
            done, num_done = number + 1, num_done + end - start
            ctx.agree()
            if ctx.wants_checkpoint():
                _save_texts(ctx, found, pieces[:done], recorder)
            ctx.progress(num_done, total)
    except StopRequested:
        _save_texts(ctx, found, pieces[:done], recorder)
        raise
    return {split: torch.cat(parts) for split, parts in found.items()}


def _copy(rows: Tensors, tensors: Tensors) -> None:
    """Copies tensors into those of the same names. Raises KeyError or RuntimeError if they do not fit."""
    for name, kept in rows.items():
        kept.copy_(tensors[name])


def _layers_of(pieces: list[Piece], recorder: Recorder | None) -> Tensors:
    """Returns what is kept of the layers for the texts of the training split in these first pieces."""
    num_texts = max((piece.end for piece in pieces if piece.split == "train"), default=0)
    return recorder.rows(0, num_texts) if recorder else {}


def _save_texts(
    ctx: StageContext, found: dict[str, list[Tensor]], done: list[Piece], recorder: Recorder | None
) -> None:
    answers = {split: torch.cat(parts) for split, parts in found.items() if parts}
    ctx.save_checkpoint(len(done), answers | _layers_of(done, recorder), {})


def _restore(ctx: StageContext, fill: Callable[[int, Tensors], None]) -> int:
    """Returns how many parts a checkpoint holds; `fill` takes them over, and raises KeyError or RuntimeError."""
    checkpoint = ctx.find_checkpoint()
    if checkpoint is None:
        return 0
    tensors, state = checkpoint
    done = int(state["step"])
    try:
        fill(done, tensors)
    except (KeyError, RuntimeError) as error:
        raise CheckpointUnfit(f"{type(error).__name__}: {error}") from error
    return done


class Asked(NamedTuple):
    """A language model, what gives the logits of a batch's rows, or what makes them; and what it is to answer.

    `num_classes` are the tokens among which it chooses; `recorder` keeps its layers meanwhile, if that is wanted.
    """

    model: Module
    hear: Hear
    data: Blocks
    num_classes: int
    recorder: Recorder | None


class Draft:
    """The shard that is being written, of as many blocks as all but the last have.

    Attributes:
        width: The classes that are kept of a row.
        start, end: The first block, and the one after the last.
    """

    def __init__(self, ctx: StageContext, asked: Asked, settings: "Answer") -> None:
        num_drawn = settings.num_samples if settings.rest == "samples" else 0
        self.width = min(settings.top_k, asked.num_classes) + num_drawn
        self._ctx, self._data, self._recorder = ctx, asked.data, asked.recorder
        block_bytes = asked.data.max_length * (8 * self.width + 4)
        if asked.recorder:
            block_bytes = max(block_bytes, asked.recorder.text_bytes)
        self._num_blocks = max(1, shards.SHARD_BYTES // block_bytes)
        self.begin(0)

    def begin(self, number: int) -> None:
        """Makes room for the shard of this number, in place of the one before."""
        self._number, self.start = number, number * self._num_blocks
        self.end = min(self.start + self._num_blocks, len(self._data))
        self._first_place = self.start * self._data.max_length
        num_places = min(self.end * self._data.max_length, self._data.num_places) - self._first_place
        self._tensors: Tensors = {}  # those before are gone before others take room
        self._tensors = {
            "classes": torch.zeros((num_places, self.width), dtype=torch.int32),
            "log_p": torch.zeros((num_places, self.width)),
            "log_rest": torch.zeros(num_places),
        }
        if self._recorder:
            self._recorder.begin(self.start, self.end)

    def put(self, rows_N: Tensor, **values: Tensor) -> None:
        """Fills in rows, which are places of the stream."""
        for name, tensor in values.items():
            self._tensors[name][rows_N - self._first_place] = tensor.to("cpu", self._tensors[name].dtype)

    def rows(self, start: int, end: int) -> Tensors:
        """Returns what is kept of some of the blocks; what is put there is kept."""
        first, last = (block * self._data.max_length - self._first_place for block in (start, end))
        layers = self._recorder.rows(start, end) if self._recorder else {}
        return {name: tensor[first:last] for name, tensor in self._tensors.items()} | layers

    def finish(self) -> None:
        """Writes the shard and begins the next one, if there is one."""
        if ranks.number() == 0:
            folder = self._ctx.output("answers")
            path = shards.shard_path(folder, ANSWERS, self._number)
            save_file(self._tensors, path)
            self._ctx.finish(path)
            if self._recorder:
                self._ctx.finish(self._recorder.save(folder, self._number))
        if self.end < len(self._data):
            self.begin(self._number + 1)
        else:
            self.start = self.end

    def restore(self, done: int, tensors: Tensors) -> None:
        """Goes on after so many blocks; `tensors` are those of the shard that was not finished.

        Raises:
            KeyError or RuntimeError: They are of other shards.
        """
        num_whole = -(-done // self._num_blocks) if done == len(self._data) else done // self._num_blocks
        if self._ctx.num_finished != num_whole * (2 if self._recorder else 1):
            raise KeyError(f"{self._ctx.num_finished} files are finished")
        if done < len(self._data):
            self.begin(num_whole)
            _copy(self.rows(self.start, done), tensors)

    def mean_rest(self) -> float:
        """Returns the mean probability of the tokens that are not kept, of the rows that are learned."""
        learned_N = torch.from_numpy(self._data.is_learned[1:])
        parts = learned_N.split(self._num_blocks * self._data.max_length)
        whole = shards.Shards(self._ctx.output("answers"), ANSWERS)
        sums = [kept["log_rest"][part].exp().double().sum() for kept, part in zip(whole, parts, strict=True)]
        return float(sum(sums) / learned_N.sum())


def keep_likeliest(ctx: StageContext, asked: Asked, settings: "Answer") -> tuple[int, float]:
    """Writes the likeliest tokens at each place of the split; returns how many, and their probability on average.

    The shards `answers-00000.safetensors` and so on (`worker/engine/shards.py`) hold `classes` (int32) and `log_p`
    (float32), `top_k` a row and then the draws from the rest, if any; and `log_rest` (float32), of all other tokens.
    What is kept of layers is in shards of the same blocks. Only the shard that is being written is in memory, and in
    checkpoints.

    Raises:
        StageFailed: `spec_invalid` where nothing is left to draw from.
        StopRequested: After handing over a checkpoint; a run that goes on from it asks only for what is left.
    """
    data, num_classes = asked.data, asked.num_classes
    if settings.rest == "samples" and settings.top_k >= num_classes:
        message = f"top_k keeps all {num_classes} tokens, so that nothing is left to draw from."
        raise StageFailed("spec_invalid", message, suggestion="Lower top_k, or set rest to together.")
    draft = Draft(ctx, asked, settings)
    done = _restore(ctx, draft.restore)
    if done:
        log.info("going on from block %d", done)
    in_step = is_sharded(asked.model)
    try:
        while done < len(data):
            ctx.progress(done, len(data))
            some = range(done, min(done + ranks.count(), draft.end))
            for block, is_mine in ranks.turns(some, in_step=in_step):
                if asked.recorder:
                    asked.recorder.keeps = range(block, block + is_mine)
                batch = data.batch(np.array([block]), ctx.device)
                _answer_block(ctx, asked, batch if is_mine else batch.without_rows(), draft, settings)
            ranks.hand_over(draft.rows(some.start, some.stop).values(), ctx.device)
            done = some.stop
            if done == draft.end:
                draft.finish()
            ctx.agree()
            if ctx.wants_checkpoint():
                ctx.save_checkpoint(done, draft.rows(draft.start, done), {})
    except StopRequested:
        ctx.save_checkpoint(done, draft.rows(draft.start, done), {})
        raise
    ctx.progress(len(data), len(data))
    return draft.width, 0.0 if ranks.number() else 1 - draft.mean_rest()


def _answer_block(ctx: StageContext, asked: Asked, batch: Batch, draft: Draft, settings: "Answer") -> None:
    """Fills in what the teacher says of the rows of a batch."""
    with torch.no_grad(), autocast(ctx.device):
        found = asked.hear(batch)
    num_kept, chunk = min(settings.top_k, asked.num_classes), rows_at_once(batch.labels, asked.num_classes)
    rows_N = batch.row_numbers
    for start in range(0, len(rows_N), chunk):
        some = slice(start, start + chunk)
        logits_NC = found[some] if isinstance(found, Tensor) else found.logits(some)
        signal = SparseSignal.from_logits(logits_NC, num_kept, settings.temperature)
        classes_NM, log_p_NM = signal.classes_NK, signal.log_p_NK
        if settings.rest == "samples":
            dice = torch.Generator(logits_NC.device).manual_seed(ctx.seed * 2**31 + int(rows_N[start]))
            drawn = SampledSignal.from_logits(logits_NC, num_kept, settings.num_samples, dice, settings.temperature)
            classes_NM, log_p_NM = drawn.classes_NM, drawn.log_target_NM
        draft.put(rows_N[some], classes=classes_NM, log_p=log_p_NM, log_rest=signal.log_rest_N)
