"""Measurement of teacher, student and every exported form on the test split."""

import json
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
import transformers
from numpy.typing import NDArray

from core.methods import list_methods
from worker.engine.context import StageContext
from worker.engine.data import Encoded, Examples, encode
from worker.engine.measuring import answer_all, count_bytes, time_singles
from worker.engine.rendering import write_html, write_model_card
from worker.engine.runtimes import Forward, open_model
from worker.engine.scores import accuracy, bootstrap, macro_f1, per_class

if TYPE_CHECKING:
    from worker.methods.stages.evaluate import Evaluate

REPORT_VERSION = 1
log = logging.getLogger(__name__)


def evaluate(ctx: StageContext, settings: "Evaluate") -> dict[str, Any]:
    """Measures every model, writes the report in three forms, and returns its main table.

    `report.json` holds, under `schema_version` 1: `job`, `task`, `labels`, `test` (split and size), `confidence`,
    `models` (the main table, the teacher first), `per_class` (of the student), `spec`, `environment`, `measured_by`
    (the job's id), `stages` (the earlier ones, with state, seconds, and whose result a cached one took over),
    `training` (their series) and `notes`. Sizes are in bytes, latencies in milliseconds, throughput in texts a second,
    and scores are shares of 1.
    """
    test = ctx.get_split("test")
    labels_N = np.array(test.labels, dtype=np.int64)
    names = list_candidates(ctx)
    rows, answers, timed = [], {}, []
    for index, name in enumerate(names):
        ctx.progress(index, len(names) + 1)
        row, answers[name], model = measure(ctx, settings, name, test)
        row["agreement"] = float((answers[name] == answers["teacher"]).mean())
        rows.append(row)
        timed.append(model)
    ctx.progress(len(names), len(names) + 1)
    latencies = time_singles(timed, settings.latency_samples, ctx.check_stop)
    models = [
        row | {"latency_p50_ms": p50, "latency_p95_ms": p95} for row, (p50, p95) in zip(rows, latencies, strict=True)
    ]
    for row in models:
        log.info("%s", row)
    report = {
        "schema_version": REPORT_VERSION,
        "job": ctx.spec.name,
        "task": ctx.spec.task.model_dump(mode="json"),
        "labels": ctx.labels,
        "test": {"split": ctx.spec.data.test, "num_examples": len(test.texts)},
        "confidence": settings.confidence,
        "models": models,
        "per_class": per_class(labels_N, answers["student"], ctx.labels),
        "spec": ctx.spec.model_dump(mode="json"),
        "environment": describe_environment(ctx),
        "measured_by": ctx.order.job_id,
        "stages": ctx.order.earlier,
        "training": read_history(ctx.order.inputs_dir / "history.jsonl"),
        "notes": NOTES,
    }
    write_report(report, ctx.output("report"))
    ctx.progress(len(names) + 1, len(names) + 1)
    return {"models": models, "num_examples": len(test.texts)}


NOTES = (
    "Intervals: percentile bootstrap over the test examples, 1,000 resamples, without the randomness of training.",
    "Latency: one text at a time, without padding, the models in turn. Throughput: batches of 32 sorted by length. "
    "A warm-up comes first; tokenising is not timed.",
    "Folders of transformers run in PyTorch, ONNX files in onnxruntime, all on the processor.",
    "Size: all files of the form, with tokenizer and config.",
    "Agreement: share of test texts with the label that the teacher gives.",
)


def list_candidates(ctx: StageContext) -> list[str]:
    """Returns the models to measure: teacher, student, and the exported forms that are there, in the spec's order."""
    forms = [
        form.kind
        for stage in ctx.spec.stages
        for form in getattr(stage, "formats", [])
        if form.kind in list_methods("exporters")
    ]
    return ["teacher", "student", *dict.fromkeys(form for form in forms if ctx.has_input(form))]


def measure(
    ctx: StageContext, settings: "Evaluate", name: str, test: Examples
) -> tuple[dict[str, Any], NDArray[np.int64], tuple[Forward, Encoded]]:
    """Returns one row of the main table without latency, the predicted classes, and what to time."""
    folder, tokenizer = ctx.input(name), ctx.load_tokenizer(name)
    model = open_model(folder, ctx.labels, tokenizer, ctx.num_threads)
    data = encode(test, tokenizer, model.input_names)
    found = answer_all(model.forward, data, len(ctx.labels), ctx.check_stop)
    labels_N, predicted_N = data.labels_N.numpy(), found.logits_NC.argmax(-1)
    intervals = bootstrap(labels_N, predicted_N, len(ctx.labels), settings.confidence, ctx.spec.seed)
    row = {
        "name": name,
        "runtime": model.runtime,
        "accuracy": accuracy(labels_N, predicted_N),
        "accuracy_ci": list(intervals["accuracy"]),
        "macro_f1": macro_f1(labels_N, predicted_N, len(ctx.labels)),
        "macro_f1_ci": list(intervals["macro_f1"]),
        "size_bytes": count_bytes(folder),
        "num_parameters": model.num_parameters,
        "throughput_per_s": found.throughput_per_s,
    }
    return row, predicted_N, (model.forward, data)


def describe_environment(ctx: StageContext) -> dict[str, Any]:
    """Returns the versions and the processor that the figures hold for."""
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


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `report.json`, `MODEL_CARD.md` and `report.html`."""
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    write_model_card(report, folder / "MODEL_CARD.md")
    write_html(report, folder / "report.html")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
