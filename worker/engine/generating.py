"""What a language model writes after prompts, a batch at a time."""

import json
import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.asking import write_by_asking
from worker.engine.blocks import IS_CUT, Written
from worker.engine.context import StageContext
from worker.engine.data import read_rows, read_text
from worker.engine.devices import autocast
from worker.engine.failures import CheckpointUnfit, StopRequested

if TYPE_CHECKING:
    from worker.engine.language import LanguageModelling
    from worker.methods.stages.generate import Generate
    from worker.methods.teachers.openai import OpenAI

TEXTS_FILE = "train.jsonl"
Ids = NDArray[np.int32]
log = logging.getLogger(__name__)


def go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Ids],
    new_tokens: int,
    temperature: float,
    num_tokens: int | None = None,
) -> list[Ids]:
    """Returns what the model writes after each prompt, with the end token if it came to one.

    At temperature 0 it takes the likeliest token each time, else it draws from all of them, by torch's generator; of
    the first `num_tokens` alone, where that is given.
    """
    width, pad = max(len(prompt) for prompt in prompts), tokenizer.pad_token_id or 0
    ids_BT = torch.full((len(prompts), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BT[row, width - len(prompt) :] = 1
    drawing = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
    beyond = [] if num_tokens is None else [*range(num_tokens, model.config.vocab_size)]
    only = {"suppress_tokens": beyond} if beyond else {}
    config = GenerationConfig(
        max_new_tokens=new_tokens, use_cache=True, do_sample=temperature > 0, **ends, **drawing, **only
    )
    its_own = model.generation_config
    model.generation_config = GenerationConfig()  # what a chat model brings would fill in what is not said here
    try:
        with torch.no_grad(), autocast(model.device):
            written_BT = model.generate(
                ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=config
            )
    finally:
        model.generation_config = its_own
    return [_up_to(written_T, tokenizer.eos_token_id) for written_T in written_BT[:, width:].cpu().numpy()]


def _up_to(ids_T: NDArray[np.int64], end: int | None) -> Ids:
    ends = np.flatnonzero(ids_T == end)
    return ids_T[: ends[0] + 1 if len(ends) else None].astype(np.int32)


def generate(ctx: StageContext, settings: "Generate") -> dict[str, Any]:
    """Writes the training split that later stages read: the rows that have a prompt, with what the teacher wrote.

    Raises:
        StageFailed: `dataset_invalid` if no row has a prompt.
        StopRequested: After handing over a checkpoint; a run that goes on from it writes the same texts.
    """
    if not ctx.spec.teacher.is_model:
        return ask_for_texts(ctx, settings)
    task, path = cast("LanguageModelling", ctx.task), ctx.get_split("train")
    model, tokenizer = ctx.load_teacher(), ctx.load_tokenizer("teacher")
    prompts = task.prompts(path, model, tokenizer, settings)
    order = sorted((row for row, ids in enumerate(prompts) if len(ids)), key=lambda row: len(prompts[row]))
    if not order:
        raise StageFailed("dataset_invalid", f"No row of {path.name} has a prompt to go on after.")
    texts, done = _restore(ctx)
    try:
        for start in range(done, len(order), settings.batch_size):
            ctx.progress(start, len(order))
            some = order[start : start + settings.batch_size]
            torch.manual_seed(ctx.seed + start)
            asked = [prompts[row] for row in some]
            written = go_on(model, tokenizer, asked, settings.new_tokens, settings.temperature)
            texts |= {row: _decode(task, tokenizer, *pair) for row, *pair in zip(some, asked, written, strict=True)}
            done = start + len(some)
            if ctx.wants_checkpoint():
                _save(ctx, texts, done)
    except StopRequested:
        _save(ctx, texts, done)
        raise
    ctx.progress(len(order), len(order))
    return _write(ctx, read_rows(path, dict), task.task.text, texts)


def ask_for_texts(ctx: StageContext, settings: "Generate") -> dict[str, Any]:
    """Writes the training split as `generate` does, of what the teacher's API answers to each prompt.

    Raises:
        StageFailed: `dataset_invalid` if no row has a prompt or one is no text, or whatever ended the asking.
    """
    columns, path = ctx.spec.task.columns(), ctx.get_split("train")
    read = read_rows(path, lambda row: (row, read_text(row, columns["prompt"])))
    rows, prompts = [row for row, _ in read], [prompt for _, prompt in read]
    asked = [row for row, prompt in enumerate(prompts) if prompt.strip()]
    if not asked:
        raise StageFailed("dataset_invalid", f"No row of {path.name} has a prompt to go on after.")
    written = write_by_asking(ctx, cast("OpenAI", ctx.spec.teacher), [prompts[row] for row in asked], settings)
    texts = {row: one for row, one in zip(asked, written, strict=True) if one.text}
    if len(texts) < len(asked):
        num_empty = len(asked) - len(texts)
        message = f"{num_empty} of {len(asked)} prompts got an empty answer; their rows are left out."
        ctx.warn("answers_empty", message, num_empty=num_empty, num_prompts=len(asked))
    if not texts:
        hint = "See teacher.prompt, teacher.system and the stage's new_tokens."
        raise StageFailed("teacher_unavailable", "The teacher's API wrote nothing.", suggestion=hint)
    return _write(ctx, rows, columns["text"], texts)


def _write(ctx: StageContext, rows: list[dict[str, Any]], column: str, texts: dict[int, Written]) -> dict[str, Any]:
    """Writes the rows that have a text with it in that column; returns the stage's summary."""
    with (ctx.output("texts") / TEXTS_FILE).open("w", encoding="utf-8") as file:
        for row, (text, is_cut) in sorted(texts.items()):
            file.write(json.dumps(rows[row] | {IS_CUT: is_cut, column: text}, ensure_ascii=False) + "\n")
    log.info("the teacher wrote %d texts", len(texts))
    num_cut = sum(text.is_cut for text in texts.values())
    if num_cut:
        message = f"{num_cut} of {len(texts)} texts were cut off, so no end is learned of them; raise new_tokens."
        ctx.warn("answers_cut", message, num_cut=num_cut, num_texts=len(texts))
    return {"num_texts": len(texts), "num_left_out": len(rows) - len(texts), "num_cut": num_cut}


def _decode(task: "LanguageModelling", tokenizer: PreTrainedTokenizerBase, prompt: Ids, written: Ids) -> Written:
    """Returns what was written as a text; without a prompt column it begins with what it went on after."""
    whole = written if task.task.prompt else np.concatenate([prompt, written])
    text = str(tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Written(text, is_cut=written[-1:].tolist() != [tokenizer.eos_token_id])


def _save(ctx: StageContext, texts: dict[int, Written], done: int) -> None:
    raw = json.dumps(list(texts.items())).encode()
    ctx.save_checkpoint(done, {"written": torch.frombuffer(bytearray(raw), dtype=torch.uint8)}, {})


def _restore(ctx: StageContext) -> tuple[dict[int, Written], int]:
    found = ctx.find_checkpoint()
    if found is None:
        return {}, 0
    tensors, state = found
    try:
        texts = {row: Written(*one) for row, one in json.loads(tensors["written"].numpy().tobytes())}
    except (KeyError, ValueError) as error:
        raise CheckpointUnfit(f"{type(error).__name__}: {error}") from error
    log.info("going on from text %d", state["step"])
    return texts, state["step"]
