"""The report as a web page and as a model card."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from worker.engine.plots import plot_front, plot_losses, plot_quality

if TYPE_CHECKING:
    from worker.engine.evaluation import Card, Column, Quality

TEMPLATES_DIR = Path(__file__).parent / "templates"


def write_html(report: dict[str, Any], columns: "Sequence[Column]", quality: "Quality", path: Path) -> None:
    """Writes one page that needs no other file and no network."""
    models = report["models"]
    plots = [
        ("Loss curves", plot_losses(report["training"], quality)),
        ("Quality against size", plot_quality(models, quality, "size_bytes", "size on disk, MB", 1e6)),
        (
            "Quality against latency",
            plot_quality(models, quality, "latency_p50_ms", "median latency at batch 1, ms", 1.0),
        ),
    ]
    plots += [("Pareto front", plot_front(points)) for points in _find_points(report["stages"])]
    # the SVG comes from our own plots, whose texts matplotlib escapes
    figures = [(title, Markup(svg)) for title, svg in plots if svg]  # noqa: S704
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(**report, columns=columns, quality=quality, figures=figures, settings=to_yaml(report["spec"]))
    )
    path.write_text(page, encoding="utf-8")


def _find_points(stages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns what each search among the stages measured."""
    return [stage["summary"]["points"] for stage in stages if (stage["summary"] or {}).get("points")]


def write_model_card(report: dict[str, Any], columns: "Sequence[Column]", card: "Card", path: Path) -> None:
    """Writes a model card for the student in the form that the Hugging Face Hub reads."""
    page = (
        _environment()
        .get_template(card.template)
        .render(
            **report,
            columns=columns,
            front_matter=Markup(to_yaml(front_matter(report, card))),  # noqa: S704  # YAML quotes what needs it
            settings=Markup(to_yaml(report["spec"])),  # noqa: S704  # inside an indented block, which Markdown shows as it is
        )
    )
    path.write_text(page, encoding="utf-8")


def front_matter(report: dict[str, Any], card: "Card") -> dict[str, Any]:
    """Returns the card's metadata.

    Source: huggingface_hub, `ModelCardData` and the model-index specification.
    """
    split = report["test"]["split"]
    teacher = report["spec"]["teacher"]["model"]
    student = next(model for model in report["models"] if model["name"] == "student")
    result = {
        "task": {"type": card.pipeline_tag, "name": card.pipeline_tag.replace("-", " ").title()},
        "dataset": {"type": split, "name": split},
        "metrics": card.metrics(student),
    }
    data = {
        "library_name": "transformers",
        "pipeline_tag": card.pipeline_tag,
        "tags": [card.pipeline_tag, "knowledge-distillation", "stillhouse"],
        "model-index": [{"name": report["job"], "results": [result]}],
    }
    if teacher.startswith("hub:"):
        data["base_model"] = teacher.removeprefix("hub:").partition("@")[0]
    return data


def to_yaml(data: Any) -> str:
    """Returns the data as YAML, in the order it has."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def if_known(key: str, show: Callable[[Any], str]) -> Callable[[dict[str, Any]], str]:
    """Returns what shows a value of a model's row, and a dash where it is not known."""
    return lambda row: "–" if row[key] is None else show(row[key])


def percent(share: float) -> str:
    """Returns a share of 1 in percent."""
    return f"{100 * share:.2f}"


def percent_range(interval: Sequence[float]) -> str:
    """Returns an interval of shares in percent."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent)
    return environment
