"""What tasks gain or lose in one model: each beside a model that was trained for it alone."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from worker.engine.evaluation import Row, list_candidates
from worker.engine.loading import refuse_new_head
from worker.engine.scores import bootstrap_sums

if TYPE_CHECKING:
    from worker.engine.classification import Classification
    from worker.engine.multitask import MultiTask
    from worker.methods.stages.evaluate import Evaluate

Predicted = NDArray[Any]


def compare_alone(
    run: "MultiTask",
    settings: "Evaluate",
    tests: Mapping[str, Any],
    student: Row,
    chosen: Mapping[str, Predicted],
) -> dict[str, list[Row]]:
    """Returns as `transfer` a row for each task that has a model of its own; nothing where no task has one.

    `student` is the student's row of the main table, and `chosen` what it says of each task's split, predicted_N.
    A row has `task`, `metric` (the task's score that is a share of 1), that score with its interval and the model's
    `size_bytes` and `num_parameters`, both `alone` and `together`, and the `difference`, positive where the student is
    better, with its interval: percentiles over resamples of the test examples, of which both models have the same ones.

    Raises:
        StageFailed: `teacher_unavailable` for a model that cannot be loaded, or has no head for its task's labels.
    """
    sources, ctx = settings.sources(), run.ctx
    total = len(list_candidates(ctx)) + len(sources)
    rows = []
    for number, (role, source) in enumerate(sources.items(), total - len(sources) + 1):
        task = str(source.part)
        part, test = run.parts[task], tests[task]
        single = part.measure_one(settings, role, test, partial(_load, part, task))
        alone, together = (
            {"score": scores[part.share], "score_ci": scores[f"{part.share}_ci"]}
            | {key: costs[key] for key in ("size_bytes", "num_parameters")}
            for scores, costs in ((single.row, single.row), (student["tasks"][task], student))
        )
        interval = _bootstrap_difference(settings, part, test, chosen[task], single.predicted_N)
        row = {"task": task, "metric": part.share, "alone": alone, "together": together}
        rows.append(row | {"difference": together["score"] - alone["score"], "difference_ci": interval})
        ctx.progress(number, total)
    return {"transfer": rows} if rows else {}


def _load(part: "Classification", task: str, folder: Path) -> PreTrainedModel:
    model = part.load_model(folder)
    refuse_new_head(model, f"model of '{task}' alone", part.labels)
    return model


def _bootstrap_difference(
    settings: "Evaluate", part: "Classification", test: Any, chosen_N: Predicted, others_N: Predicted
) -> list[float]:
    """Returns the interval of by how much one score is larger than another on the same resampled examples."""
    first_NJ, second_NJ = (part.sums_of(test, some_N) for some_N in (chosen_N, others_N))
    width = first_NJ.shape[1]
    return bootstrap_sums(
        np.concatenate([first_NJ, second_NJ], axis=1),
        lambda sums_2J: part.share_of(sums_2J[:width]) - part.share_of(sums_2J[width:]),
        settings.confidence,
        part.ctx.spec.seed,
    )
