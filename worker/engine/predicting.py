"""What teacher and student say of a few texts, side by side."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.blocks import read_prompts
from worker.engine.data import Encoded, check_tokens
from worker.engine.generating import go_on
from worker.engine.inference import answer_rows, as_answer
from worker.engine.loading import count_positions

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.methods.stages.predict import Predict

ROLES = ("teacher", "student")


class Said(NamedTuple):
    """What a model says of each text, and the milliseconds that each took."""

    answers: list[dict[str, Any]]
    times_ms: list[float]


def predict(ctx: "StageContext", settings: "Predict") -> dict[str, Any]:
    """Writes what each model says, `predictions.json`; returns how long it took, which is not the same each time.

    The file is a list of `{"text", "pair", "teacher", "student"}`, without what there is not.
    """
    roles = [role for role in ROLES if ctx.has_input(role)]
    said: dict[str, Said] = {}
    for number, role in enumerate(roles):
        ctx.progress(number, len(roles))
        model = ctx.load_teacher() if role == "teacher" else ctx.place(ctx.load_model(role)).eval()
        said[role] = ctx.task.predict(model, ctx.load_tokenizer(role), settings)
    ctx.progress(len(roles), len(roles))
    rows: list[dict[str, Any]] = [{"text": text} for text in settings.texts]
    for row, pair in zip(rows, settings.pairs, strict=False):
        row["pair"] = pair
    for role, (answers, _) in said.items():
        for row, answer in zip(rows, answers, strict=True):
            row[role] = answer
    text = json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False)
    (ctx.output("predictions") / "predictions.json").write_text(text + "\n", encoding="utf-8")
    times = {role: [round(ms, 3) for ms in one.times_ms] for role, one in said.items()}
    return {"num_texts": len(rows), "milliseconds": times}


def write_rows(ctx: "StageContext", rows: Iterable[dict[str, Any]]) -> Path:
    """Returns a file of rows, as a stored split is one."""
    path = ctx.scratch_dir / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_each(model: PreTrainedModel, data: Encoded, between: Callable[[], None]) -> tuple[Tensor, list[float]]:
    """Returns the logits of every row, logits_NC, and the milliseconds of each text, which is answered alone."""
    answer = as_answer(model)
    times_ms: list[float] = []

    def timed(inputs: dict[str, Tensor]) -> Tensor:
        began = time.perf_counter()
        found = answer(inputs).cpu()
        times_ms.append((time.perf_counter() - began) * 1e3)
        return found

    batches = [data.batch(np.array([row]), model.device) for row in range(len(data))]
    answer(batches[0].inputs)  # the first call does what no other has to
    return answer_rows(data, batches, timed, between), times_ms


def go_on_each(
    ctx: "StageContext", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Predict", *, chat: bool
) -> Said:
    """Returns how a language model goes on after each text. Raises StageFailed for one without a token."""
    longest = count_positions(model) or sys.maxsize
    new_tokens = min(settings.new_tokens, longest - 1)
    path = write_rows(ctx, ({"prompt": text, "text": ""} for text in settings.texts))
    columns = {"prompt": "prompt", "text": "text"}
    prompts = read_prompts(path, columns, tokenizer, longest - new_tokens, is_chat=chat)
    if not all(map(len, prompts)):
        message = "The tokenizer makes nothing of one of the texts."
        raise StageFailed("spec_invalid", message, suggestion="Leave it out, or write it in other words.")
    counts_V = np.bincount(np.concatenate(prompts))
    check_tokens(counts_V, model.config.vocab_size, tokenizer, path.stem, "model")
    said = Said([], [])
    for ids in prompts:
        ctx.check_stop()
        began = time.perf_counter()
        [written] = go_on(model, tokenizer, [ids], new_tokens, 0.0)
        said.times_ms.append((time.perf_counter() - began) * 1e3)
        text = str(tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        is_cut = written[-1:].tolist() != [tokenizer.eos_token_id]
        said.answers.append({"continuation": text, "is_cut": is_cut})
    return said
