"""Stages run through the real child process, on a pico model, without a supervisor."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.jobs.spec import load_spec
from tests import pico
from worker.child import ForkServer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from worker.engine.context import StageContext

LABELS = sorted(pico.WORDS)
FAST = {"epochs": 10, "learning_rate": 4e-3, "head_learning_rate": 2e-2, "batch_size": 32}


def make_spec(stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    spec = {
        "name": "pico",
        "teacher": {"model": "pico"},
        "student": {"kind": "teacher_layers", "keep": [0, 2]},
        "data": "toy",
        "stages": stages,
        "seed": 7,
        "deterministic": True,  # where there is a GPU
    }
    return load_spec(spec | changes).model_dump(mode="json")


@dataclass
class Finished:
    """What a child left behind."""

    returncode: int
    reports: list[dict[str, Any]]
    log: str
    outputs: Path

    @property
    def last(self) -> dict[str, Any]:
        return self.reports[-1]

    def of(self, type: str) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["type"] == type]

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for found, step, value in self.points() if found == name]

    def points(self) -> list[list[Any]]:
        return [point for report in self.of("metrics") for point in report["points"]]


@cache
def get_server() -> ForkServer:
    """Returns the server of this test run; it ends with the run."""
    return ForkServer(1, Path(tempfile.gettempdir()) / "stillhouse-tests-cache")


@dataclass
class Bench:
    """The folders of one job, as the supervisor lays them out."""

    root: Path
    server: ForkServer = field(default_factory=get_server)

    @property
    def inputs(self) -> Path:
        return self.root / "in"

    def lay(self) -> "Bench":
        pico.write_data(self.inputs / "data")
        pico.write_model(self.inputs / "teacher")
        return self

    def lay_language(self) -> "Bench":
        pico.write_walks(self.inputs / "data")
        pico.write_language_model(self.inputs / "teacher")
        return self

    def copy(self, root: Path) -> "Bench":
        made = Bench(root, self.server)
        shutil.copytree(self.inputs, made.inputs)
        return made

    def write_order(self, spec: dict[str, Any], ordinal: int, name: str, **changes: Any) -> Path:
        outputs, whole = self.root / name / "out", load_spec(spec)
        outputs.mkdir(parents=True)
        checkpoint = changes.get("checkpoint")
        if checkpoint and finished_before(Path(checkpoint)).is_dir():
            shutil.copytree(finished_before(Path(checkpoint)), outputs, dirs_exist_ok=True)
        order = {
            "stage": whole.stages[ordinal].content(),
            "spec": whole.seen_by(whole.stages[ordinal]),
            "ordinal": ordinal,
            "labels": LABELS,
            "inputs_dir": str(self.inputs),
            "outputs_dir": str(outputs),
            "num_threads": 1,
            "num_processes": 1,
            "shard_layers": False,
            "max_memory_bytes": 0,
            "job_id": "job_0",
            "earlier": [],
            "checkpoint": None,
            "checkpoint_s": 60,
        }
        path = self.root / name / "order.json"
        path.write_text(json.dumps(order | changes), encoding="utf-8")
        return path

    @contextmanager
    def surround(
        self, spec: dict[str, Any], ordinal: int = 0, name: str = "", **changes: Any
    ) -> "Iterator[StageContext]":
        """Yields what a stage knows and holds, in this process."""
        from worker.engine.context import Order, StageContext  # with torch, which most that run stages do without
        from worker.engine.mailbox import Mailbox
        from worker.engine.reporting import Reporter

        order = self.write_order(spec, ordinal, name or f"stage-{ordinal}", **changes)
        with open(os.devnull, "wb") as nowhere:
            parsed = Order.parse(json.loads(order.read_text()))
            ctx = StageContext(parsed, Reporter(nowhere.fileno()), threading.Event(), Mailbox())
            yield ctx
            ctx.close()

    @contextmanager
    def start(self, order: Path) -> Iterator[Stage]:
        """Yields the running stage."""
        stage = self.server.fork(order, order.parent / "log")
        with stage.stdin, stage.exit_code, stage.reports:
            yield stage

    def run(self, spec: dict[str, Any], ordinal: int = 0, name: str = "", **changes: Any) -> Finished:
        order = self.write_order(spec, ordinal, name or f"stage-{ordinal}", **changes)
        with self.start(order) as stage:
            reports = [json.loads(line) for line in stage.reports]
            code = int(stage.exit_code.read())
        return Finished(code, reports, (order.parent / "log").read_text(), order.parent / "out")

    def succeed(self, spec: dict[str, Any], ordinal: int = 0, name: str = "", **changes: Any) -> Finished:
        """Runs a stage that must end with a result."""
        finished = self.run(spec, ordinal, name, **changes)
        assert finished.last["type"] == "result", finished.log
        return finished

    def succeed_all(self, spec: dict[str, Any], **changes: Any) -> list[Finished]:
        """Runs every stage, each on what the earlier ones made."""
        done = []
        for ordinal, stage in enumerate(spec["stages"]):
            done.append(self.succeed(spec, ordinal, **changes))
            self.adopt(done[-1], ordinal, stage["kind"])
        return done

    def interrupt(self, order: Path, after: int, how: str) -> tuple[list[Path], list[list[Any]]]:
        """Runs a stage until its `after`-th checkpoint and ends it; returns its checkpoints in order, and points.

        What a killed one wrote later, as its death takes a moment, is left out: there may be nothing left to do then.
        """
        found, points = [], []
        with self.start(order) as stage:
            for line in stage.reports:
                report = json.loads(line)
                if report["type"] == "metrics":
                    points += report["points"]
                if report["type"] == "checkpoint":
                    found.append(order.parent / "checkpoints" / report["name"])
                    for path in report["finished"]:
                        target = finished_before(found[-1]) / path
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.unlink(missing_ok=True)  # where it stops right after a checkpoint
                        target.hardlink_to(order.parent / "out" / path)
                        target.chmod(0o444)
                    if len(found) == after and how == "kill":
                        os.kill(stage.pid, signal.SIGKILL)
                    elif len(found) == after:
                        stage.stdin.write(b'{"order": "stop"}\n')
        assert len(found) >= after, f"it ended after {len(found)} checkpoints"
        return found[:after] if how == "kill" else found, points

    def adopt(self, finished: Finished, ordinal: int, kind: str) -> None:
        """Makes a stage's outputs the inputs of the next one, read-only."""
        for folder in finished.outputs.iterdir():
            target = self.inputs / folder.name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target)
            for path in target.iterdir():
                path.chmod(0o444)
        with (self.inputs / "history.jsonl").open("a", encoding="utf-8") as history:
            for name, step, value in finished.points():
                point = {"ordinal": ordinal, "kind": kind, "name": name, "step": step, "value": value}
                history.write(json.dumps(point) + "\n")


def finished_before(checkpoint: Path) -> Path:
    """Returns where the outputs lie that were finished before a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.name}-finished")


def read_answers(folder: Path) -> "dict[str, Tensor]":
    """Returns all that was kept of a language model's answers, the rows of all files in order."""
    import torch
    from safetensors.torch import load_file

    shards = [load_file(path) for path in sorted(folder.glob("answers-*"))]
    rows = {name: torch.cat([shard[name] for shard in shards]) for name in ("classes", "log_p", "log_rest")}
    return rows | load_file(folder / "answers.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def teach_classes(root: Path, prompt: str, words: dict[str, str]) -> Path:
    """Returns the folder of a language model that has learned to go on after a prompt with the words of the class."""
    bench = Bench(root).lay_language()
    for path in pico.write_data(bench.inputs / "data").values():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [{"prompt": prompt.format(text=row["text"]), "text": words[row["label"]].strip()} for row in rows]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = {"kind": "causal_lm", "prompt": "prompt", "block_tokens": 32}
    learn = {"kind": "finetune", "epochs": 30, "learning_rate": 2e-3, "batch_size": 4, "dropout": 0.0}
    return bench.succeed(make_spec([learn], task=task), labels=[]).outputs / "teacher"
