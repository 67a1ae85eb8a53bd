"""A job while it runs: one bar a stage on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from stillhouse.client import Client
from stillhouse.commands.output import say, size, stderr
from stillhouse.errors import ClientError
from stillhouse.results import Event, Job, Stage

LOSS = "loss/total"
LOSS_PAUSE_S = 2.0
LINE_PAUSE_S = 10.0
MARKS = {"succeeded": "✓", "cached": "✓", "failed": "✗", "cancelled": "–"}
SPOKEN = {"running", "succeeded"}  # states that a bar shows by itself


class View(Protocol):
    """Something that shows a job while it runs."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, job: Job) -> None:
        """Shows the job as it is now."""

    def tell(self, event: Event) -> None:
        """Shows a warning."""


def open_view(client: Client) -> View:
    """Returns bars for a terminal, lines for anything else."""
    losses = Losses(client)
    return Bars(losses) if sys.stderr.isatty() else Lines(losses)


class Losses:
    """The newest loss of the running stage, asked for every other second."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked_at = 0.0
        self._found: dict[int, float] = {}

    def find(self, job: Job, stage: Stage) -> float | None:
        """Returns the loss of a stage, or None when it has none."""
        now = time.monotonic()
        if stage.state == "running" and now - self._asked_at >= LOSS_PAUSE_S:
            self._asked_at = now
            try:
                for series in self._client.jobs.metrics(job.id, [LOSS], stage=stage.ordinal):
                    value = series.points[-1][1]
                    self._found[stage.ordinal] = math.nan if value is None else value
            except ClientError:  # a bar without a loss is better than none
                return self._found.get(stage.ordinal)
        return self._found.get(stage.ordinal)


class Bars:
    """One bar a stage."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._tasks: dict[int, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.fields[mark]} {task.description:<10}"),
            BarColumn(complete_style="cyan", finished_style="green"),
            TextColumn("{task.percentage:>4.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr(),
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, job: Job) -> None:
        """Moves the bars."""
        for stage in job.stages:
            if stage.ordinal not in self._tasks:
                self._tasks[stage.ordinal] = self._progress.add_task(
                    stage.kind, total=1.0, start=False, mark=" ", note=stage.state
                )
            task = self._tasks[stage.ordinal]
            if stage.state == "running":
                self._progress.start_task(task)
            self._progress.update(
                task,
                completed=stage.progress,
                mark=MARKS.get(stage.state, " "),
                note=describe(stage, self._losses.find(job, stage)) if stage.state in SPOKEN else stage.status,
            )
            if stage.state in MARKS:
                self._progress.stop_task(task)

    def tell(self, event: Event) -> None:
        """Prints a warning above the bars; an error is told at the end."""
        if event.level == "warning":
            self._progress.console.print(Text(f"{event.level}: {event.message}", style="yellow"))


class Lines:
    """A line whenever a stage changes its state, and every ten seconds while it runs."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._states: dict[int, str] = {}
        self._job_state = ""
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, job: Job) -> None:
        """Prints what changed."""
        if job.state != self._job_state:
            self._job_state = job.state
            say(f"{job.name} ({job.id}): {job.state}")
        now = time.monotonic()
        for stage in job.stages:
            changed = self._states.get(stage.ordinal, "pending") != stage.state
            due = stage.state == "running" and now - self._said_at >= LINE_PAUSE_S
            if changed or due:
                self._states[stage.ordinal] = stage.state
                self._said_at = now
                note = describe(stage, self._losses.find(job, stage))
                say(f"  {stage.kind}: {stage.status} {stage.progress:.0%}  {note}".rstrip())

    def tell(self, event: Event) -> None:
        """Prints a warning; an error is told at the end."""
        if event.level == "warning":
            say(f"  {event.level}: {event.message}")


def describe(stage: Stage, loss: float | None) -> str:
    """Returns what is worth knowing of a stage beside its bar: loss and time left."""
    parts = [] if loss is None else [f"loss {loss:.4g}"]
    if stage.state == "running":
        if stage.total_steps:
            parts.append(f"step {stage.step}/{stage.total_steps}")
        if stage.eta_s is not None:
            parts.append(f"{stage.eta_s:.0f} s left")
    return "  ".join(parts)


@contextmanager
def byte_bar(total: int) -> "Iterator[_Counter]":
    """Yields a function that counts arrived bytes, shown as a bar on a terminal."""
    progress = Progress(
        TextColumn("download"), BarColumn(), TextColumn("{task.fields[note]}"), console=stderr(), transient=True
    )
    task = progress.add_task("download", total=total, note="")
    progress.disable = not sys.stderr.isatty()
    with progress:
        yield _Counter(progress, task, total)


class _Counter:
    def __init__(self, progress: Progress, task: TaskID, total: int) -> None:
        self._progress, self._task, self._total = progress, task, total

    def __call__(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)
        done = self._progress.tasks[0].completed
        self._progress.update(self._task, note=f"{size(done)} of {size(self._total)}")
