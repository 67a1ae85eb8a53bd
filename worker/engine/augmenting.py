"""Copies of texts with some words left out."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from worker.engine.context import StageContext
from worker.engine.data import read_rows

if TYPE_CHECKING:
    from worker.methods.stages.augment import Augment

TEXTS = ("text", "pair")  # roles of columns


def augment(ctx: StageContext, settings: "Augment") -> dict[str, Any]:
    """Writes the training split, and then the copies, one after the other; returns how many texts there are."""
    path = ctx.get_split("train")
    rows = read_rows(path, dict)
    columns = [column for role, column in ctx.spec.task.columns().items() if role in TEXTS]
    with (ctx.output("texts") / path.name).open("w", encoding="utf-8") as file:
        for copy in range(settings.copies + 1):
            dice = np.random.default_rng([ctx.seed, copy])
            for row in rows:
                changed = columns if copy else []
                texts = {column: leave_out(row[column], settings.deletion_probability, dice) for column in changed}
                file.write(json.dumps(row | texts, ensure_ascii=False) + "\n")
            ctx.progress(copy + 1, settings.copies + 1)
    return {"num_texts": len(rows) * (settings.copies + 1)}


def leave_out(text: str, probability: float, dice: np.random.Generator) -> str:
    """Returns the words that stay, in their order: at least one, if there is one."""
    words = text.split()
    stays = dice.random(len(words)) >= probability
    if words and not stays.any():
        stays[dice.integers(len(words))] = True
    return " ".join(word for word, is_kept in zip(words, stays, strict=True) if is_kept)
