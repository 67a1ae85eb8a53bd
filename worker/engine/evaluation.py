"""Measurement of teacher, student and every exported form on the test split, and the report on it."""

import json
import logging
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from worker.engine.context import StageContext
from worker.engine.rendering import if_known, write_html, write_model_card

if TYPE_CHECKING:
    from worker.methods.stages.evaluate import Evaluate

REPORT_VERSION = 1
log = logging.getLogger(__name__)
Row = dict[str, Any]


class Column(NamedTuple):
    """A column of the main table: its title, and what it shows of a model's row."""

    title: str
    show: Callable[[Row], str]


class Quality(NamedTuple):
    """How good a model is, for the plots: a key of its row, with its interval under `<key>_ci`, times `scale`.

    The training stages report the same on the validation split as `validation/<key>`.
    """

    key: str
    title: str
    scale: float


class Card(NamedTuple):
    """What the model card says of the task: its template, and the Hub's names of the task and of two metrics."""

    template: str
    pipeline_tag: str
    metrics: Callable[[Row], list[dict[str, Any]]]


class Measured(NamedTuple):
    """What a task measured: a row a model, the teacher first, and how to show it."""

    num_examples: int
    models: list[Row]
    columns: list[Column]
    quality: Quality
    card: Card
    notes: tuple[str, ...]
    details: dict[str, Any]


def evaluate(ctx: StageContext, settings: "Evaluate") -> dict[str, Any]:
    """Measures every model, writes the report in three forms, and returns its main table.

    `report.json` holds, under `schema_version` 1: `job`, `task`, `labels`, `test` (split and size), `confidence`,
    `models` (the main table, the teacher first), what the task has besides (`per_class` of a classifier,
    `transfer` of several tasks, see `compare_alone`), `spec`, `environment`, `measured_by` (the job's id), `stages`
    (the earlier ones, with state, seconds, summary, and whose result a cached one took over), `training` (their series)
    and `notes`. Sizes are in bytes, latencies in milliseconds, and scores are shares of 1 unless the task's notes say
    otherwise.
    """
    with ctx.reporter.phase("measure"):
        measured = ctx.task.measure(settings)
    for row in measured.models:
        log.info("%s", row)
    report = {
        "schema_version": REPORT_VERSION,
        "job": ctx.spec.name,
        "task": ctx.spec.task.model_dump(mode="json"),
        "labels": ctx.labels,
        "test": {"split": ", ".join(ctx.spec.data.refs_of("test").values()), "num_examples": measured.num_examples},
        "confidence": settings.confidence,
        "models": measured.models,
        **measured.details,
        "spec": ctx.spec.model_dump(mode="json"),
        "environment": describe_environment(ctx),
        "measured_by": ctx.order.job_id,
        "stages": ctx.order.earlier,
        "training": read_history(ctx.order.inputs_dir / "history.jsonl"),
        "notes": (*measured.notes, *NOTES),
    }
    write_report(report, measured, ctx.output("report"))
    return {"models": measured.models, "num_examples": measured.num_examples}


NOTES = (
    "Folders of transformers run in PyTorch, forms in the type of their weights and others in float32, ONNX files in "
    "onnxruntime, OpenVINO's in OpenVINO (with arithmetic in float32), all on the processor.",
    "Size: all files of the form, with tokenizer and config.",
)


def list_candidates(ctx: StageContext) -> list[str]:
    """Returns the models to measure: teacher (if it is one), student, and the exported forms, in the spec's order."""
    forms = [form.kind for stage in ctx.spec.stages for form in stage.forms() if form.is_measured]
    models = ["teacher", "student"] if ctx.spec.teacher.is_model else ["student"]
    return [*models, *dict.fromkeys(form for form in forms if ctx.has_input(form))]


def as_stored(name: str, load: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """Returns what loads a candidate: a form in the type that it is stored in, teacher and student in float32."""
    return load if name in ("teacher", "student") else partial(load, dtype="auto")


def open_candidates(ctx: StageContext) -> dict[str, Any]:
    """Returns the language models to measure, each where `transformers` would have its own."""
    from worker.engine.runtimes import Running  # whose import starts a thread

    folders = {name: ctx.input(name) for name in list_candidates(ctx)}
    return {
        name: Running(folder, ctx.num_threads) if is_graph else as_stored(name, ctx.load_model)(name).eval()
        for name, folder in folders.items()
        for is_graph in [(folder / "model.onnx").is_file()]
    }


def row_of_answers(scores: Row) -> Row:
    """Returns the row of a teacher that only answers: how good it is, but not what it costs."""
    return {"name": "teacher", "runtime": "answers"} | dict.fromkeys(COSTS) | scores


def describe_environment(ctx: StageContext) -> dict[str, Any]:
    """Returns the versions and the processor that the figures hold for."""
    import onnxruntime

    return {
        "processor": _processor_name(),
        "num_threads": ctx.num_threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def read_history(path: Path) -> list[dict[str, Any]]:
    """Returns the series of earlier stages: `{"ordinal", "kind", "name", "points": [[step, value], …]}`."""
    series: dict[tuple[int, str, str], list[list[float]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        point = json.loads(line)
        key = (point["ordinal"], point["kind"], point["name"])
        series.setdefault(key, []).append([point["step"], point["value"]])
    return [
        {"ordinal": ordinal, "kind": kind, "name": name, "points": sorted(points)}
        for (ordinal, kind, name), points in sorted(series.items())
    ]


def write_report(report: dict[str, Any], measured: Measured, folder: Path) -> None:
    """Writes `report.json`, `MODEL_CARD.md` and `report.html`."""
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    columns = [*FIRST_COLUMNS, *measured.columns, *COST_COLUMNS]
    write_model_card(report, columns, measured.card, folder / "MODEL_CARD.md")
    write_html(report, columns, measured.quality, folder / "report.html")


FIRST_COLUMNS = (Column("model", lambda row: row["name"]), Column("runtime", lambda row: row["runtime"]))
COSTS = ("size_bytes", "num_parameters", "throughput_per_s", "latency_p50_ms", "latency_p95_ms")
COST_COLUMNS = (
    Column("size, MB", if_known("size_bytes", lambda value: f"{value / 1e6:.2f}")),
    Column("parameters", if_known("num_parameters", "{:,}".format)),
    Column("p50, ms", if_known("latency_p50_ms", "{:.2f}".format)),
    Column("p95, ms", if_known("latency_p95_ms", "{:.2f}".format)),
)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
