"""What a stage knows and holds: its order, models, data, and the line to the supervisor."""

import errno
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from core.jobs.spec import JobSpec
from core.methods import Stage
from core.registry import list_methods
from worker.engine import checkpoints, ranks
from worker.engine.devices import choose_device
from worker.engine.failures import StopRequested, is_storage_full
from worker.engine.loading import load_tokenizer
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter
from worker.engine.sharding import shard_layers
from worker.engine.tasks import TaskRun

OPEN_REQUESTS = 256  # more than the supervisor has open at once, so that it never waits for us
WAIT_S = 0.2
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What the supervisor ordered."""

    stage: Stage
    spec: JobSpec
    ordinal: int
    labels: list[str]
    inputs_dir: Path
    outputs_dir: Path
    num_threads: int
    shard_layers: bool
    max_memory_bytes: int
    job_id: str
    earlier: list[dict[str, Any]]
    checkpoint: Path | None
    checkpoint_s: float

    @classmethod
    def parse(cls, data: dict[str, Any]) -> "Order":
        """Returns the order in parsed JSON."""
        stage = data["stage"]
        return cls(
            stage=list_methods("stages")[stage["kind"]].model_validate(stage),  # type: ignore[arg-type]
            spec=JobSpec.model_validate(data["spec"]),
            ordinal=data["ordinal"],
            labels=data["labels"],
            inputs_dir=Path(data["inputs_dir"]),
            outputs_dir=Path(data["outputs_dir"]),
            num_threads=data["num_threads"],
            shard_layers=data["shard_layers"],
            max_memory_bytes=data["max_memory_bytes"],
            job_id=data["job_id"],
            earlier=data["earlier"],
            checkpoint=Path(data["checkpoint"]) if data["checkpoint"] else None,
            checkpoint_s=data["checkpoint_s"],
        )


class StageContext:
    """The surroundings of one running stage."""

    def __init__(self, order: Order, reporter: Reporter, stop: threading.Event, mailbox: Mailbox) -> None:
        self.order = order
        self.spec = order.spec
        self.labels = order.labels
        self.task: TaskRun = order.spec.task.build(self)
        self.reporter = reporter
        self.device = choose_device()
        self.share_done = 0.0  # of a training stage, 0 at its first step and 1 at its last
        self.part = ""  # of several tasks the one that sees it
        self.hears_again = False  # whether several students hear the teacher on the same texts
        self.is_own_text = False  # whether the student wrote what a training stage's step is about
        self._stop, self._mailbox = stop, mailbox
        self._all_stop = self._all_save = False  # as all processes of the stage have agreed
        self._remembered: dict[str, Any] = {}
        self.scratch_dir = Path(tempfile.mkdtemp(prefix="scratch-", dir=order.outputs_dir.parent))
        self._pacer = checkpoints.Pacer(order.checkpoint_s)
        self._skipped_checkpoint = False
        there = sorted(path for path in order.outputs_dir.rglob("*") if path.is_file())
        self._finished = [path.relative_to(order.outputs_dir).as_posix() for path in there]
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    @property
    def seed(self) -> int:
        """The seed of every random choice of this stage; two stages of a job draw differently."""
        return (self.spec.seed * 1009 + self.order.ordinal) % 2**31

    @property
    def num_threads(self) -> int:
        """The number of threads to compute with."""
        return ranks.num_threads(self.order.num_threads)

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns the model on the device, its layers split among the processes if that is wanted."""
        if self.order.shard_layers and ranks.count() > 1:
            shard_layers(model)
        placed: PreTrainedModel = model.to(self.device)
        return placed

    def close(self) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self.scratch_dir, ignore_errors=True)

    def check_stop(self) -> None:
        """Raises StopRequested once the supervisor ordered a stop; else shows that the stage is alive.

        Processes that work together stop together, where they have agreed on it.
        """
        self.reporter.beat()
        if self._all_stop if ranks.count() > 1 else self._stop.is_set():
            raise StopRequested

    def agree(self) -> None:
        """Lets all processes of the stage know what the first one is to do after this step; all must call it."""
        if ranks.count() > 1:
            own = [float(self._stop.is_set()), float(ranks.number() == 0 and self._pacer.is_due())]
            self._all_stop, self._all_save = ranks.add_up(torch.tensor(own, device=self.device)).bool().tolist()

    def progress(self, step: int, total: int) -> None:
        """Reports how far the stage is, and stops here if that is ordered."""
        self.reporter.progress(step, total)
        self.check_stop()

    def ask(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns what the teacher's API answers to requests, in their order; the supervisor asks it.

        Raises:
            StageFailed: Whatever ended the asking; what was answered until then is kept for the next time.
        """
        answers: dict[int, dict[str, Any]] = {}
        num_sent = 0
        while len(answers) < len(bodies):
            while num_sent < len(bodies) and num_sent - len(answers) < OPEN_REQUESTS:
                self.reporter.ask(num_sent, bodies[num_sent])
                num_sent += 1
            for order in self._mailbox.take(WAIT_S):
                if "error" in order:
                    raise StageFailed(**order["error"])
                answers[order["number"]] = order["answer"]
            self.progress(len(answers), len(bodies))
        return [answers[number] for number in range(len(bodies))]

    def find_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Returns the tensors and the state from which this stage goes on, or None when it starts."""
        return checkpoints.read(self.order.checkpoint) if self.order.checkpoint else None

    @property
    def num_finished(self) -> int:
        """The number of outputs that are whole; where the stage goes on, those that its checkpoint counts on are."""
        return len(self._finished)

    def finish(self, path: Path) -> None:
        """Notes that a file among the outputs is whole and stays as it is: later checkpoints need not hold it."""
        self._finished.append(path.relative_to(self.order.outputs_dir).as_posix())

    def wants_checkpoint(self) -> bool:
        """Tells whether a checkpoint is due, to which all processes add their part and which the first one writes."""
        return self._all_save if ranks.count() > 1 else self._pacer.is_due()

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a checkpoint and hands it to the supervisor; without room for it, warns once and goes on."""
        if ranks.number():
            return
        began = time.monotonic()
        folder = self.order.outputs_dir.parent / "checkpoints"
        folder.mkdir(exist_ok=True)
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        identity = {"job_id": self.order.job_id, "ordinal": self.order.ordinal, "step": step}
        try:
            if shutil.disk_usage(folder).free < 1.2 * size_bytes + checkpoints.FREE_RESERVE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            checkpoints.write(folder / f"{step}.safetensors", tensors, state | identity)
        except Exception as error:  # the library has an error type of its own
            if not is_storage_full(error):
                raise
            if not self._skipped_checkpoint:
                self.warn("checkpoint_skipped", "The disk has no room for a checkpoint.", size_bytes=size_bytes)
            self._skipped_checkpoint = True
        else:
            self.reporter.checkpoint(step, f"{step}.safetensors", self._finished)
        self._pacer.note(time.monotonic() - began)

    def warn(self, type: str, message: str, **data: Any) -> None:
        """Reports a warning event."""
        self.reporter.event(type, "warning", message, **data)

    def input(self, role: str) -> Path:
        """Returns the read-only folder of a role. Raises StageFailed when it is not there."""
        folder = self.order.inputs_dir / role
        if not folder.is_dir():
            reason = "teacher_unavailable" if role == "teacher" else "internal"
            raise StageFailed(reason, f"The stage was given no '{role}'.")  # type: ignore[arg-type]
        return folder

    def has_input(self, role: str) -> bool:
        """Returns whether an earlier stage made this role."""
        return (self.order.inputs_dir / role).is_dir()

    def output(self, role: str) -> Path:
        """Returns the folder, made if need be, for what this stage makes in a role; only the first process's counts."""
        folder = (self.scratch_dir if ranks.number() else self.order.outputs_dir) / role
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load_model(self, role: str, **options: Any) -> PreTrainedModel:
        """Returns the role's model for this job's task, in float32 by default, on the processor."""
        with self.reporter.phase(f"load {role}"):
            return self.task.load_model(self.input(role), **options)

    def load_teacher(self) -> PreTrainedModel:
        """Returns the stage's teacher on the device, loaded once; warns where its answers are random."""

        def load() -> PreTrainedModel:
            teacher = self.place(self.load_model("teacher")).eval()
            if teacher.has_new_head:
                message = "The teacher has no head for these classes: its answers are random."
                self.warn("teacher_untrained", f"{message} Put a finetune stage before distill.")
            return teacher

        return self.remember("teacher", load)

    def load_tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """Returns the role's tokenizer."""
        return load_tokenizer(self.input(role))

    def find_split(self, name: str) -> Path | None:
        """Returns the file of a split, JSON Lines, or None when the spec has none of that name.

        Of several tasks it is a folder with a file for each.
        """
        written = self.order.inputs_dir / "texts" / f"{name}.jsonl"  # by the teacher, in an earlier stage
        given = self.order.inputs_dir / "data"
        return next((path for path in (written, given / f"{name}.jsonl", given / name) if path.exists()), None)

    def get_split(self, name: str) -> Path:
        """Returns the file of a split. Raises StageFailed when there is none."""
        path = self.find_split(name)
        if path is None:
            raise StageFailed("dataset_invalid", f"The job has no {name} split.", suggestion=f"Set data.{name}.")
        return path

    def remember(self, key: str, make: Callable[[], T]) -> T:
        """Returns what `make` returned the first time it was asked for under this key."""
        if key not in self._remembered:
            self._remembered[key] = make()
        found: T = self._remembered[key]
        return found
