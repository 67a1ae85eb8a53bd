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
from worker.engine import ranks
from worker.engine.blocks import Blocks
from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.devices import autocast
from worker.engine.failures import CheckpointUnfit, StopRequested
from worker.engine.keeping import Recorder
from worker.engine.measuring import count_bytes
from worker.engine.sharding import is_sharded
from worker.engine.teaching import ANSWERS_FILE
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
    what `keep_likeliest` returns (and as `test` its sums over each block of the test split). Its metadata hold, as JSON
    under `about`, the digest of the split, the temperature, the teacher's scores on the validation split, and what
    became of the rest. What was asked for of the teacher's layers is beside it (`worker/engine/keeping.py`).
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
    if kept.layers:
        kept.layers.save(folder)
    told = kept.tensors.get("log_rest")
    num_rows = sum(map(len, kept.tensors.values())) if told is None else len(told)
    size_bytes = count_bytes(folder)
    sizes = {"size_bytes": size_bytes, "bytes_per_row": round(size_bytes / num_rows, 2)}
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


def _rows_of(tensors: Tensors) -> Tensors:
    """Returns the tensors that have a row for each of the split."""
    return {name: tensor for name, tensor in tensors.items() if tensor.dim()}


class Asked(NamedTuple):
    """A language model, what gives the logits of a batch's rows, or what makes them; and what it is to answer.

    `num_classes` are the tokens among which it chooses; `recorder` keeps its layers meanwhile, if that is wanted.
    """

    model: Module
    hear: Hear
    data: Blocks
    num_classes: int
    recorder: Recorder | None


def keep_likeliest(ctx: StageContext, asked: Asked, settings: "Answer") -> tuple[Tensors, float]:
    """Returns the likeliest tokens at each place of the split, and the probability that they have on average.

    The tensors are `classes` (int32) and `log_p` (float32), `top_k` a row and then the draws from the rest, if any;
    `log_rest` (float32), of all other tokens; and `num_classes`, the tokens among which the teacher chose.

    Raises:
        StageFailed: `spec_invalid` where nothing is left to draw from.
        StopRequested: After handing over a checkpoint; a run that goes on from it asks only for what is left.
    """
    data, num_classes = asked.data, asked.num_classes
    num_kept = min(settings.top_k, num_classes)
    if settings.rest == "samples" and num_kept == num_classes:
        message = f"top_k keeps all {num_classes} tokens, so that nothing is left to draw from."
        raise StageFailed("spec_invalid", message, suggestion="Lower top_k, or set rest to together.")
    width = num_kept + (settings.num_samples if settings.rest == "samples" else 0)
    kept = {
        "classes": torch.zeros((data.num_places, width), dtype=torch.int32),
        "log_p": torch.zeros((data.num_places, width)),
        "log_rest": torch.zeros(data.num_places),
        "num_classes": torch.tensor(num_classes),
    }
    done = _restore(ctx, lambda done, tensors: _copy(_rows_between(kept, 0, done, asked), tensors))
    if done:
        log.info("going on from block %d", done)
    in_step = is_sharded(asked.model)
    try:
        while done < len(data):
            ctx.progress(done, len(data))
            some = range(done, min(done + ranks.count(), len(data)))
            batches = (data.batch(np.array([block]), ctx.device) for block in some)
            for batch in ranks.share(batches, in_step=in_step):
                _answer_block(ctx, asked, batch, kept, settings)
            ranks.hand_over(_rows_between(kept, some.start, some.stop, asked).values(), ctx.device)
            done = some.stop
            ctx.agree()
            if ctx.wants_checkpoint():
                _save(ctx, kept, done, asked)
    except StopRequested:
        _save(ctx, kept, done, asked)
        raise
    ctx.progress(len(data), len(data))
    rest = kept["log_rest"][torch.from_numpy(data.is_learned_S[1:])].exp()
    return kept, 1 - rest.double().mean().item()


def _answer_block(ctx: StageContext, asked: Asked, batch: Batch, kept: Tensors, settings: "Answer") -> None:
    """Fills in what the teacher says of the rows of a batch."""
    if asked.recorder:
        asked.recorder.is_on = batch.counts
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
        kept["classes"][rows_N[some]] = classes_NM.int().cpu()
        kept["log_p"][rows_N[some]] = log_p_NM.float().cpu()
        kept["log_rest"][rows_N[some]] = signal.log_rest_N.float().cpu()


def _rows_between(kept: Tensors, start: int, end: int, asked: Asked) -> Tensors:
    """Returns what is kept of some blocks."""
    places, layers = asked.data.max_length, asked.recorder.rows(start, end) if asked.recorder else {}
    return {name: tensor[start * places : end * places] for name, tensor in _rows_of(kept).items()} | layers


def _save(ctx: StageContext, kept: Tensors, done: int, asked: Asked) -> None:
    ctx.save_checkpoint(done, _rows_between(kept, 0, done, asked), {})
