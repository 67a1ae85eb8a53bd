"""Models with fewer tokens: the rows of embeddings and of the last layer that their data do not use are left out."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Embedding, Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.changes import WHOLE, Reader, compare
from worker.engine.context import StageContext
from worker.engine.data import NO_ROWS
from worker.engine.loading import load_tokenizer
from worker.engine.pieces import keep_tokens, renumber_ids
from worker.engine.students import load_either

if TYPE_CHECKING:
    from worker.methods.stages.trim_vocabulary import TrimVocabulary

log = logging.getLogger(__name__)


class Vocabulary(NamedTuple):
    """The tokens that a model is left with, by their old ids, and the tokenizer that knows only these."""

    kept: list[int]
    tokenizer: PreTrainedTokenizerBase


def trim(ctx: StageContext, settings: "TrimVocabulary") -> dict[str, Any]:
    """Leaves out of a model and its tokenizer what the data do not use; returns the stage's summary.

    Raises:
        StageFailed: `export_unsupported` where the tokenizer or the model is of a kind that is not known.
    """
    model, tokenizer = load_either(ctx, settings.of)
    wanted = choose_tokens(count_tokens(ctx, model, tokenizer, settings.splits), settings)
    kept, trimmed_tokenizer = keep_only(tokenizer, wanted, ctx.scratch_dir / "tokenizer")
    trimmed = keep_rows(model, kept)
    ctx.task.save_model(trimmed, trimmed_tokenizer, ctx.output(settings.of))
    log.info("%d of %d tokens are kept", len(kept), model.config.vocab_size)
    return {
        "num_tokens": len(kept),
        "num_tokens_before": model.config.vocab_size,
    } | compare(ctx, Reader(model, tokenizer), Reader(trimmed, trimmed_tokenizer))


def count_tokens(
    ctx: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splits: Sequence[str]
) -> NDArray[np.int64]:
    """Returns how often each token occurs in these splits, counts_V."""
    counts_V = np.zeros(max(model.config.vocab_size, len(tokenizer)), dtype=np.int64)
    for split in splits:
        path = ctx.find_split(split)
        if path is not None:
            found = ctx.task.encode(path, model, tokenizer, WHOLE).count_ids()
            counts_V[: len(found)] += found
        ctx.check_stop()
    return counts_V


def list_vocabularies(
    ctx: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Vocabulary]:
    """Returns the tokens that the data use, and then, for models that only read, those that they use at least twice."""
    counts_V = count_tokens(ctx, model, tokenizer, ("train", "validation"))
    leasts = (1, 2) if (counts_V == 1).any() and not ctx.spec.task.shares_tokens else (1,)
    found = [keep_only(tokenizer, np.flatnonzero(counts_V >= n), ctx.scratch_dir / f"tokenizer-{n}") for n in leasts]
    for least, vocabulary in zip(leasts, found, strict=True):
        log.info("%d of %d tokens are used at least %d times", len(vocabulary.kept), model.config.vocab_size, least)
    return found


def keep_only(tokenizer: PreTrainedTokenizerBase, wanted: NDArray[np.int64], folder: Path) -> Vocabulary:
    """Returns the wanted tokens, by their ids, with those that they need; the tokenizer is written into the folder."""
    kept = keep_tokens(tokenizer, wanted.tolist(), folder)
    smaller = load_tokenizer(folder)
    smaller.model_max_length = tokenizer.model_max_length
    return Vocabulary(kept, smaller)


def choose_tokens(counts_V: NDArray[np.int64], settings: "TrimVocabulary") -> NDArray[np.int64]:
    """Returns the ids of the tokens that are to stay for their own sake."""
    often = np.argsort(-counts_V, kind="stable")[: settings.max_tokens]
    often = often[counts_V[often] >= settings.min_count]
    return np.union1d(often, np.arange(min(settings.keep_first, len(counts_V))))


def keep_rows(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Returns a model of the same class with these rows, by their old ids, of its embedding and its last layer.

    Raises:
        StageFailed: `export_unsupported` if other tensors have a row for each token, too, `vocab_incompatible` if the
            model lacks rows that are to stay.
    """
    config = copy.deepcopy(model.config)
    if kept[-1] >= config.vocab_size:  # texts have none of these
        message = f"Special tokens have ids up to {kept[-1]}, and the model has rows for {config.vocab_size} tokens."
        raise StageFailed("vocab_incompatible", message, suggestion=NO_ROWS)
    renumber_ids(config, kept)
    config.vocab_size = len(kept)
    places, num_lost = _find_places(model), 0
    if places:  # the first one comes after the padding's number, which may be a smaller one now
        num_lost = model.config.pad_token_id - config.pad_token_id
        config.max_position_embeddings -= num_lost
    trimmed = type(model)._from_config(config, dtype=torch.float32)
    trimmed.has_new_head = model.has_new_head
    if model.can_generate():
        trimmed.generation_config = copy.deepcopy(model.generation_config)
        renumber_ids(trimmed.generation_config, kept)
    rows = torch.tensor(kept)
    owners = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    state = {name: _cut(model, name, tensor, owners, rows) for name, tensor in model.state_dict().items()}
    if places:
        state[f"{places}.weight"] = state[f"{places}.weight"][num_lost:]
    try:
        trimmed.load_state_dict(state)
    except RuntimeError as error:
        message = f"A '{model.config.model_type}' keeps its tokens in more places than embedding and last layer."
        raise StageFailed("export_unsupported", message, suggestion="Leave the stage out.") from error
    return trimmed


def _find_places(model: PreTrainedModel) -> str | None:
    """Returns the name of the table of places of a model that counts them from its padding's number, as RoBERTa."""
    words, padding = model.get_input_embeddings(), model.config.pad_token_id
    tables = [(name, one) for name, one in model.named_modules() if isinstance(one, Embedding) and one is not words]
    return next((name for name, one in tables if padding is not None and one.padding_idx == padding), None)


def _cut(model: PreTrainedModel, name: str, tensor: Tensor, owners: list[Module], rows: Tensor) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    return tensor[rows] if any(owner is one for one in owners) else tensor
