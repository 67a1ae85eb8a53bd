"""Jobs of settings drawn at random: each is refused when it is submitted, or does what it was told to."""

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.jobs.resolving import check_models
from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from tests.chaos.drawing import draw_stages, draw_student
from tests.engine_bench import LABELS, Bench
from tests.unit.test_engine_keeping import write_labels, write_tags
from tests.unit.test_engine_multitask import LABELS as LABELS_OF
from tests.unit.test_engine_multitask import TEXTS, WORDS, change, labels_of, lay

pytestmark = pytest.mark.chaos
NUM_JOBS = 40  # of each task that run
SEED = 5_000_000
ALL = TEXTS | WORDS
MAY_FAIL = ("goal_missed", "export_unsupported", "loss_not_finite")  # what only a run can tell
TASKS: dict[str, dict[str, Any]] = {
    "texts": {"kind": "text_classification"},
    "labels": {"kind": "multi_label_classification"},
    "numbers": {"kind": "text_regression", "value": "words"},
    "words": {"kind": "token_classification"},
    "several": {"kind": "multi_task"},
    "language": {"kind": "causal_lm", "block_tokens": 32},
}


def lay_task(name: str, root: Path) -> tuple[Bench, list[str]]:
    """Lays data and a teacher, and the same model for students; returns the labels, too, of one task."""
    if name == "several":
        bench, labels = lay(root, ALL), []
    elif name == "language":
        bench, labels = Bench(root).lay_language(), []
    else:
        bench, labels = Bench(root).lay(), LABELS
        data = bench.inputs / "data"
        if name == "words":
            labels = write_tags(data)
        if name == "labels":
            labels = write_labels(data)
        if name == "numbers":
            labels = LABELS_OF["size"]
            for path in data.iterdir():
                rows = [change(json.loads(line), "size") for line in path.read_text().splitlines()]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(bench.inputs / "teacher", bench.inputs / "base")
    return bench, labels


def draw_spec(rng: random.Random, name: str) -> dict[str, Any]:
    """Returns a spec of a task, of which nothing was checked."""
    stages = draw_stages(rng, writes=name == "language")
    task, data = copy.deepcopy(TASKS[name]), "toy"
    if name == "several":
        names = rng.sample(sorted(ALL), rng.randint(2, 3))
        task |= {"tasks": {one: ALL[one] for one in names}, "shared": rng.choice(["all", "all", "adapters", 1])}
        data = dict.fromkeys(names, "toy")
        if task["shared"] == "adapters":
            for stage in stages:
                if stage["kind"] in {"finetune", "distill"}:
                    stage["adapter"] = {"kind": rng.choice(["lora", "ia3", "dora", "prompt"])}
    return {"teacher": {"model": "pico"}, "student": draw_student(rng), "data": data, "task": task, "stages": stages}


def is_refused(spec: dict[str, Any], facts: ModelFacts) -> bool:
    """Returns whether a spec cannot be submitted with models like that one."""
    try:
        made = load_spec(copy.deepcopy(spec))
    except SpecInvalid:
        return True
    for stage in made.stages:
        stage.advise(made)
    assert load_spec(made.model_dump(mode="json")) == made
    return bool(check_models(made, dict.fromkeys(made.models(), facts)))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_accepted_runs(
    name: str, tmp_path: Path, record: Callable[..., None], scaled: Callable[[int], int]
) -> None:
    laid, labels = lay_task(name, tmp_path / "laid")
    teacher = laid.inputs / "teacher"
    facts = read_facts(
        json.loads((teacher / "config.json").read_text()), tensors=read_tensors(teacher / "model.safetensors")
    )
    ended: Counter[str] = Counter()
    wrong, number = [], SEED
    while ended.total() < scaled(NUM_JOBS):
        number += 1
        spec = draw_spec(random.Random(number), name)
        if is_refused(spec, facts):
            continue
        job, whole = laid.copy(tmp_path / str(number)), load_spec(spec).model_dump(mode="json")
        its_labels = labels_of(spec["task"]["tasks"]) if name == "several" else labels
        last: dict[str, Any] = {}
        for ordinal, stage in enumerate(whole["stages"]):
            finished = job.run(whole, ordinal, labels=its_labels)
            last = finished.last if finished.reports else {"type": "none", "message": finished.log}
            if last["type"] != "result":
                break
            job.adopt(finished, ordinal, stage["kind"])
        reason = last.get("reason", last["type"])
        ended[reason] += 1
        if reason not in {"result", *MAY_FAIL}:
            wrong.append({"number": number, "spec": spec, "failed": last})
        shutil.rmtree(job.root)
    record(f"jobs of {name}, drawn at random", ended.total(), f"{len(wrong)} failed by what a spec tells", "0")
    assert not wrong, json.dumps(wrong, indent=1)
