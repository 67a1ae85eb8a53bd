"""Splits that a spec names: their rows, their labels, and whether these fit the task and one another."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy.orm import Session

from core.datasets.checking import MAX_CLASSES
from core.datasets.models import Dataset
from core.datasets.repository import list_dataset_names
from core.jobs.spec import JobSpec
from core.methods import SPLITS, Task
from core.storage import get_store
from core.strict import suggest

LEAST_ROWS = 16  # that tell what numbers inside a model are like
Problems = list[dict[str, Any]]


def field_of(path: str) -> str:
    """Returns the field of the spec that names the split of this path."""
    return f"data.{path.replace('/', '.')}"


def add(problems: Problems, field: str, message: str) -> None:
    """Adds a problem."""
    problems.append({"field": field, "message": message})


def find_split(
    session: Session,
    tenant_id: str,
    find: Callable[[str], Dataset | None],
    field: str,
    ref: str,
    problems: Problems,
) -> dict[str, Any] | None:
    """Returns what is stored of the split that `ref` names, as `data/split`; None, and a problem, where none is."""
    name, _, split = ref.partition("/")
    dataset = find(name)
    if dataset is None:
        hint = suggest(name, list_dataset_names(session, tenant_id))
        add(problems, field, f"there is no data set '{name}' in your tenant; {hint}")
        return None
    if split not in dataset.splits:
        add(problems, field, f"the data set '{name}' has no split '{split}'; {suggest(split, dataset.splits)}")
        return None
    warnings = [w for w in dataset.report.get("warnings", []) if w["split"] == split and w["code"] != "no_column"]
    return {**dataset.splits[split], "dataset_id": dataset.id, "split": split, "ref": ref, "warnings": warnings}


def find_labels(spec: JobSpec, splits: dict[str, dict[str, Any]]) -> tuple[dict[str, list[str]], Problems]:
    """Returns the labels of each part of the task, and what is wrong with those of the splits."""
    problems: Problems = []
    counts = {path: _label_counts(spec.task_of(path), path, split, problems) for path, split in splits.items()}
    labels = {
        part: sorted(counts.get(f"train/{part}" if part else "train") or {}) for part in spec.task.parts() or [""]
    }
    for part in labels:
        _check_labels(spec, part, counts, problems)
    return labels, problems


def _label_counts(task: Task, path: str, split: dict[str, Any], problems: Problems) -> dict[str, int] | None:
    """Returns the classes of a split, as the upload counted them, or counted now when the job uses other columns."""
    columns = task.columns()
    missing = [name for name in columns.values() if name not in split["columns"]]
    for name in missing:
        hint = suggest(name, split["columns"])
        add(problems, field_of(path), f"'{split['ref']}' has no column '{name}'; {hint}, or set it in task")
    if missing:
        return None
    if columns == {"text": split["text_column"], "label": split["label_column"]}:
        return dict(split["label_counts"])
    return _count_labels(task, path, split, problems)


def _count_labels(task: Task, path: str, split: dict[str, Any], problems: Problems) -> dict[str, int] | None:
    counts: Counter[str] = Counter()
    for number, row in _rows(split):
        wrong, names = task.read_labels(row)
        counts.update(names)
        if wrong or len(counts) > MAX_CLASSES:
            why = f"{wrong[0].field}: {wrong[0].message}" if wrong else f"more than {MAX_CLASSES:,} labels"
            add(problems, field_of(path), f"'{split['ref']}', row {number:,}, {why}")
            return None
    return dict(counts)


def _rows(split: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    with get_store().get_path(split["sha256"]).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield number, json.loads(line)


def _check_labels(spec: JobSpec, part: str, counts: dict[str, dict[str, int] | None], problems: Problems) -> None:
    """Adds what is wrong with the labels of the spec's one task, or of one of its parts."""
    paths = {split: f"{split}/{part}" if part else split for split in SPLITS}
    task, train = spec.task_of(paths["train"]), counts.get(paths["train"])
    if train is None:
        return
    if len(train) < task.min_labels:
        named = ", ".join(f"'{label[:80]}'" for label in train) or "none"
        why = f"a {task.kind} needs at least {task.min_labels} labels; the split has {named}"
        add(problems, field_of(paths["train"]), why)
    for path in paths.values():
        unknown = sorted(set(counts.get(path) or ()) - set(train))
        if unknown:
            shown = ", ".join(f"'{label[:80]}'" for label in unknown[:5])
            why = f"labels that train lacks: {shown}; add examples to train or leave the rows out"
            add(problems, field_of(path), why)


def check_samples(spec: JobSpec, splits: dict[str, dict[str, Any]]) -> Problems:
    """Returns which stages look at a training split that shows too little."""
    found: Problems = []
    refs = spec.data.refs_of("train")
    small = [(ref, splits[path]["num_rows"]) for path, ref in refs.items() if path in splits]
    small = [(ref, num_rows) for ref, num_rows in small if num_rows < LEAST_ROWS]
    for number, stage in enumerate(spec.stages):
        for kind in stage.calibrates() if small else ():
            ref, num_rows = small[0]
            why = f"'{kind}' measures on '{ref}', which has {num_rows} rows; it needs at least {LEAST_ROWS}"
            add(found, f"stages.{number}", why)
    return found


def warn_of_data(spec: JobSpec, splits: dict[str, dict[str, Any]]) -> Problems:
    """Returns what makes the splits tell less than they seem to."""
    warnings = [
        {"field": field_of(path), "message": warning["message"]}
        for path, split in splits.items()
        for warning in split["warnings"]
    ]
    if spec.data.validation is None:
        add(warnings, "data.validation", "no validation split: nothing tells when training goes wrong")
    for path, split in splits.items():
        name, slash, part = path.partition("/")
        is_few = split["num_rows"] < LEAST_ROWS and not spec.task.shares_tokens  # a row may be a book
        if name != "train" and is_few:
            why = f"'{split['ref']}' has {split['num_rows']} rows; what is chosen or measured by them is so by chance"
            add(warnings, field_of(path), why)
        if name != "train" and split["sha256"] == splits[f"train{slash}{part}"]["sha256"]:
            add(warnings, field_of(path), "the same rows as train; measures on them will look too good")
    return warnings
