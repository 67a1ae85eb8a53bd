"""What the benches share in which ours and its peers run in turn, each in a process of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()


class Course:
    """Notes when each step ended, and the memory before the first and at the worst moment.

    Memory is what is resident, or with a GPU what is allocated on it.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before = 0

    def begin(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark
            self.before = resident("VmRSS")
        self.note()

    def note(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the begin to the end of the last step."""
        return self.ends[-1] - self.ends[0]

    @property
    def added_bytes(self) -> int:
        import torch

        highest = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
        return highest - self.before


def resident(mark: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{mark}:"))


def lay(inputs: Path, links: dict[str, Path]) -> None:
    """Makes a stage's folder of inputs, as {name: what it is}; a split's name is `data/<split>.jsonl`."""
    for name, target in links.items():
        path = inputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target.resolve())


def run_stage(folder: Path, spec: Any, stage: Any, labels: list[str], course: Course) -> Path:
    """Runs a stage as its process does, without the supervisor, on the inputs in `folder/in`; returns its outputs.

    Its draws are those of a job's first stage, whichever it is.
    """
    from worker.engine.context import Order, StageContext
    from worker.engine.mailbox import Mailbox
    from worker.engine.reporting import Reporter

    class Clock(Reporter):
        def progress(self, step: int, total: int) -> None:
            course.note() if course.ends else course.begin()
            super().progress(step, total)

    outputs = folder / "out"
    outputs.mkdir()
    order = Order.parse(
        {
            "stage": stage.model_dump(mode="json"),
            "spec": spec.model_dump(mode="json"),
            "ordinal": 0,
            "labels": labels,
            "inputs_dir": str(folder / "in"),
            "outputs_dir": str(outputs),
            "num_threads": 0,
            "shard_layers": False,
            "max_memory_bytes": 0,
            "job_id": "job",
            "earlier": [],
            "checkpoint": None,
            "checkpoint_s": 1e9,
        }
    )
    with open(os.devnull, "wb") as nowhere:
        ctx = StageContext(order, Clock(nowhere.fileno()), threading.Event(), Mailbox())
        stage.build(ctx)()
        ctx.close()
    return outputs


def measure_alone(script: str, name: str, work: Path, *options: str) -> dict[str, Any]:
    """Has the script measure a contender in a process of its own: called with `--only`, it prints what it saw."""
    command = [sys.executable, script, "--work", str(work), "--only", name, *options]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seen: dict[str, Any] = json.loads(found.splitlines()[-1])
    console.print(name, seen)
    return seen


def answer_alone(measure: Callable[[], dict[str, Any]]) -> int:
    """Prints what a contender's own process saw, for `measure_alone`."""
    from worker.engine.devices import configure_torch

    configure_torch(len(os.sched_getaffinity(0)))
    print(json.dumps(measure()))
    return 0


def show_goals(goals: dict[str, tuple[float, str]], figures: dict[str, float]) -> bool:
    """Prints each figure beside its goal, which it is to be at least, above, at most or below; tells if all are met."""
    table, all_met = Table("figure", "seen", "goal", ""), True
    for name, value in figures.items():
        goal, sense = goals[name]
        met = {"at least": value >= goal, "above": value > goal, "at most": value <= goal, "below": value < goal}[sense]
        all_met &= met
        table.add_row(name, f"{value:.3f}", f"{sense} {goal}", "met" if met else "[red]missed")
    console.print(table)
    return all_met


def finish(path: Path, goals: dict[str, tuple[float, str]], figures: dict[str, float], **seen: Any) -> int:
    """Shows the figures, writes them with what they come from, and returns the exit status: 0 if all goals are met."""
    all_met = show_goals(goals, figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**seen, "figures": figures}, indent=1))
    return 0 if all_met else 1
