"""The report as a web page and as a model card."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from worker.engine.plots import plot_losses, plot_quality

TEMPLATES_DIR = Path(__file__).parent / "templates"


def write_html(report: dict[str, Any], path: Path) -> None:
    """Writes one page that needs no other file and no network."""
    plots = [
        ("Loss curves", plot_losses(report["training"])),
        ("Quality against size", plot_quality(report["models"], "size_bytes", "size on disk, MB", 1e6)),
        (
            "Quality against latency",
            plot_quality(report["models"], "latency_p50_ms", "median latency at batch 1, ms", 1.0),
        ),
    ]
    # the SVG comes from our own plots, whose texts matplotlib escapes
    figures = [(title, Markup(svg)) for title, svg in plots if svg]  # noqa: S704
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(**report, figures=figures, settings=to_yaml(report["spec"]))
    )
    path.write_text(page, encoding="utf-8")


def write_model_card(report: dict[str, Any], path: Path) -> None:
    """Writes a model card for the student in the form that the Hugging Face Hub reads."""
    student = next(model for model in report["models"] if model["name"] == "student")
    teacher = next(model for model in report["models"] if model["name"] == "teacher")
    page = (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            **report,
            student=student,
            teacher=teacher,
            front_matter=Markup(to_yaml(front_matter(report, student))),  # noqa: S704  # YAML quotes what needs it
            settings=Markup(to_yaml(report["spec"])),  # noqa: S704  # inside an indented block, which Markdown shows as it is
        )
    )
    path.write_text(page, encoding="utf-8")


def front_matter(report: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's metadata.

    Source: huggingface_hub, `ModelCardData` and the model-index specification.
    """
    split = report["test"]["split"]
    teacher = report["spec"]["teacher"]["model"]
    metrics = [
        {"type": "accuracy", "value": round(student["accuracy"], 4), "name": "Accuracy"},
        {"type": "f1", "value": round(student["macro_f1"], 4), "name": "Macro F1"},
    ]
    result = {
        "task": {"type": "text-classification", "name": "Text Classification"},
        "dataset": {"type": split, "name": split},
        "metrics": metrics,
    }
    data = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "knowledge-distillation", "stillhouse"],
        "model-index": [{"name": report["job"], "results": [result]}],
    }
    if teacher.startswith("hub:"):
        data["base_model"] = teacher.removeprefix("hub:").partition("@")[0]
    return data


def to_yaml(data: Any) -> str:
    """Returns the data as YAML, in the order it has."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _interval(value: list[float]) -> str:
    return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, interval=_interval, megabytes=lambda size: f"{size / 1e6:.2f}")
    return environment
