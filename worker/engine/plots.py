"""The report's plots, as SVG that stands inside an HTML page."""

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from core.pareto import find_front

if TYPE_CHECKING:
    from worker.engine.evaluation import Quality

matplotlib.use("svg")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stillhouse",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def plot_losses(training: list[dict[str, Any]], quality: "Quality") -> str:
    """Returns one panel a training stage: every loss over the steps, and how good the model is on validation."""
    stages = sorted({(series["ordinal"], series["kind"]) for series in training if series["name"] == "loss/total"})
    if not stages:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(stages), 3.6), layout="constrained")
        panels = figure.subplots(1, len(stages), squeeze=False)[0]
        for panel, (ordinal, kind) in zip(panels, stages, strict=True):
            _draw_stage(panel, [series for series in training if series["ordinal"] == ordinal], quality)
            panel.set_title(f"stage {ordinal}: {kind}")
        return to_svg(figure)


def plot_quality(models: list[dict[str, Any]], quality: "Quality", field: str, title: str, unit: float) -> str:
    """Returns the quality with its interval against a cost, which is divided by `unit`, on a logarithmic axis.

    A model whose cost is not known is left out.
    """
    models = [model for model in models if model[field] is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, model in enumerate(models):
            value, (low, high) = model[quality.key], model[f"{quality.key}_ci"]
            below, above = max(0.0, value - low), max(0.0, high - value)
            axes.errorbar(
                model[field] / unit,
                quality.scale * value,
                yerr=[[quality.scale * below], [quality.scale * above]],
                fmt="os^DvP*X"[index % 8],
                color=f"C{index % 10}",
                capsize=3,
                label=model["name"],
            )
        costs = [model[field] / unit for model in models]
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.8, max(costs) * 1.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(title)
        axes.set_ylabel(f"test {quality.title}")
        axes.legend(frameon=False, fontsize=8)
        return to_svg(figure)


def plot_front(points: list[dict[str, Any]]) -> str:
    """Returns what each point of a search keeps against its size, with the front that no other point is better than."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        places = [(point["size_bytes"] / 1e6, 100 * point["retained"]) for point in points]
        is_front = find_front(points)
        for point, place, on in zip(points, places, is_front, strict=True):
            axes.plot(*place, "o" if point["meets"] else "x", color="C0" if on else "C7")
            axes.annotate(f" {point['number']} {point['form'].removeprefix('onnx_')}", place, fontsize=8)
        front = sorted(place for place, on in zip(places, is_front, strict=True) if on)
        axes.plot(*zip(*front, strict=True), "-", color="C0", linewidth=1)
        axes.set_xlabel("size on disk, MB")
        axes.set_ylabel("kept of the teacher's validation score, %")
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """Returns the figure as an `<svg>` element, without prolog, metadata and namespaces, which HTML does not need."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)


def _draw_stage(panel: Axes, series: list[dict[str, Any]], quality: "Quality") -> None:
    losses = [one for one in series if one["name"].startswith("loss/")]
    for one in losses if len(losses) > 2 else losses[:1]:  # with a single term, the total is that term
        steps, values = zip(*one["points"], strict=True)
        panel.plot(steps, values, label=one["name"].removeprefix("loss/"), linewidth=1.2)
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    handles, labels = panel.get_legend_handles_labels()
    for one in series:
        if one["name"] == f"validation/{quality.key}":
            other = panel.twinx()
            steps, values = zip(*one["points"], strict=True)
            handles += other.plot(steps, [quality.scale * value for value in values], "o--", color="black", linewidth=1)
            labels.append(f"validation {quality.key}")
            other.set_ylabel(quality.title)
            other.grid(False)
    panel.legend(handles, labels, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
