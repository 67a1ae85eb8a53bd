"""One student of a search: its files, and the stage as it sees it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from worker.engine.context import StageContext

PROGRESS_STEPS = 1000


class Half(NamedTuple):
    """A student whose training is not at its end: what the training goes on from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


Keep: TypeAlias = Callable[[Half], None]


class Trial:
    """One student's files, and the stage as it sees it: with progress and checkpoints within those of the search.

    Attributes:
        seen: The context for what trains and exports it.
    """

    def __init__(
        self, ctx: StageContext, number: int, count: int, half: Half | None = None, keep: Keep | None = None
    ) -> None:
        """Makes the folder; the training goes on from `half`, and hands what it is to go on from to `keep`."""
        self.number, self.folder = number, Path(tempfile.mkdtemp(prefix="trial-", dir=ctx.scratch_dir))
        self.seen = cast("StageContext", TrialContext(ctx, self, count, half, keep))

    def form_folder(self, kind: str) -> Path:
        """Returns the folder of one of its forms, made if need be."""
        folder = self.folder / "forms" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class TrialContext:
    """A stage as the training and export of one of its students see it."""

    def __init__(self, whole: StageContext, trial: Trial, count: int, half: Half | None, keep: Keep | None) -> None:
        self._whole, self._number, self._count, self._half, self._keep = whole, trial.number, count, half, keep
        self._remembered: dict[str, Any] = {}
        self.folder = self.scratch_dir = trial.folder
        self.reporter = TrialReporter(whole, trial.number)
        self.share_done, self.is_own_text = 0.0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def progress(self, step: int, total: int) -> None:
        """Reports how far all students are."""
        done = PROGRESS_STEPS * (self._number - 1) + PROGRESS_STEPS * step // max(1, total)
        self._whole.progress(done, PROGRESS_STEPS * self._count)

    def find_checkpoint(self) -> Half | None:
        """Returns what the student's training goes on from, or None when it starts."""
        return self._half

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Makes it part of a checkpoint of the search."""
        if self._keep:
            self._keep(Half(tensors, state | {"step": step}))

    def input(self, role: str) -> Path:
        """Returns the folder of a role, of which the student is this one."""
        return self.folder / role if role == "student" else self._whole.input(role)

    load_model, load_tokenizer, remember = (  # of its own folders, and for itself
        StageContext.load_model,
        StageContext.load_tokenizer,
        StageContext.remember,
    )


class TrialReporter:
    """Reports the series of one student under its number."""

    def __init__(self, whole: StageContext, number: int) -> None:
        self._whole, self._number = whole, number

    def metric(self, name: str, step: int, value: float) -> None:
        """Notes one point of a series."""
        self._whole.reporter.metric(f"trial/{self._number}/{name}", step, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole.reporter, name)
