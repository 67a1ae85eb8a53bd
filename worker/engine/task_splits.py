"""The splits of several tasks as one, and what teachers say of them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.data import Batch, Encoded
from worker.kernels.signals import Signal

if TYPE_CHECKING:
    from worker.engine.tasks import Scores
    from worker.engine.teaching import Teaching


@dataclass(frozen=True)
class TaskSplits:
    """A tokenised split of each task, whose batches are of one task each.

    Attributes:
        parts: The splits by task.
        values: The tasks whose models give numbers.
        temperature: How evenly tasks are drawn; see `MultiTask`.
    """

    parts: dict[str, Encoded]
    values: frozenset[str] = frozenset()
    temperature: float = 1.0

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    @property
    def max_length(self) -> int:
        """Longest example in tokens."""
        return max(part.max_length for part in self.parts.values())

    @property
    def num_cut(self) -> int:
        """Examples that were longer."""
        return sum(part.num_cut for part in self.parts.values())

    def digest(self) -> str:
        """Returns what only the same texts of the same tasks have."""
        return join_digests({name: part.digest() for name, part in self.parts.items()})

    def count_ids(self) -> NDArray[np.int64]:
        """Returns how often each token occurs, up to the last one that does, counts_V."""
        counts = [part.count_ids() for part in self.parts.values()]
        return np.sum([np.pad(found, (0, max(map(len, counts)) - len(found))) for found in counts], axis=0)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.parts.values())])

    def single(self, row: int) -> dict[str, Tensor]:
        """Returns the inputs of one example, a batch of one without padding."""
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        return [*self.parts.values()][place].single(row - int(self._starts[place]))

    def thinned(self, probability: float, seed: Sequence[int]) -> "TaskSplits":
        """Returns the splits without some tokens; see `Encoded.thinned`."""
        parts = {n: part.thinned(probability, [*seed, i]) for i, (n, part) in enumerate(self.parts.items())}
        return self.replace(parts)

    def replace(self, parts: dict[str, Any]) -> "TaskSplits":
        """Returns these splits in place of its own."""
        return TaskSplits(parts, self.values, self.temperature)

    def shuffled(self, batch_size: int, seed: Sequence[int], first: int, device: torch.device) -> Iterator[Batch]:
        """Yields one epoch of batches from number `first` on; their order is a pure function of the seed.

        Each task has its share of the batches of an epoch. One that has more batches than its share gives some of them,
        other ones in each epoch; one that has fewer begins anew, in another order.
        """
        plan = self.plan(batch_size, seed)
        names, streams = [*self.parts], {}
        for number in plan[first:]:
            name = names[number]
            if name not in streams:
                skipped = int((plan[:first] == number).sum())
                streams[name] = _endless(self.parts[name], batch_size, [*seed, int(number)], skipped, device)
            yield next(streams[name])._replace(task=name, gives_values=name in self.values)

    def plan(self, batch_size: int, seed: Sequence[int]) -> NDArray[np.int64]:
        """Returns the number of the task of each batch of an epoch, numbers_S."""
        sizes = np.array([len(part) for part in self.parts.values()], dtype=np.float64)
        shares = sizes ** (1 / self.temperature)
        num_batches = -(-len(self) // batch_size)
        wanted = shares / shares.sum() * num_batches
        counts = np.floor(wanted).astype(np.int64)
        rng, missing, over = np.random.default_rng(seed), num_batches - counts.sum(), wanted - counts
        if missing:  # drawn anew in each epoch, so that also a task with less than a batch has its turn
            counts[rng.choice(len(counts), missing, replace=False, p=over / over.sum())] += 1
        plan: NDArray[np.int64] = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        return plan


def join_digests(found: dict[str, str]) -> str:
    """Returns the digest of the splits of all tasks, by those of each."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _endless(data: Encoded, batch_size: int, seed: list[int], skipped: int, device: torch.device) -> Iterator[Batch]:
    """Yields batches of a split, in another order each time it ends, without the first ones of all."""
    per_pass = -(-len(data) // batch_size)
    turn, first = divmod(skipped, per_pass)
    while True:
        yield from data.shuffled(batch_size, [*seed, turn], first, device)
        turn, first = turn + 1, 0


class TaughtTasks:
    """Answers for each task, from where that task has them."""

    layers = None

    def __init__(self, parts: dict[str, "Teaching"], join: Callable[[dict[str, "Scores"]], "Scores"]) -> None:
        self._parts, self._join = parts, join

    def prepare(self, epoch: int, data: TaskSplits) -> TaskSplits:
        """Returns the splits as this epoch reads them."""
        return data.replace({name: part.prepare(epoch, data.parts[name]) for name, part in self._parts.items()})

    def answer(self, batch: Batch) -> Signal:
        """Returns what the teacher of the batch's task says of its rows."""
        return self._parts[batch.task].answer(batch)

    def find_heard(self, batch: Batch) -> Tensor | None:
        """Returns of which of the batch's rows the teacher of its task says anything."""
        return self._parts[batch.task].find_heard(batch)

    def score(self, validation: TaskSplits | None) -> "Scores | None":
        """Returns the teachers' scores on the validation splits."""
        if validation is None:
            return None
        found = {name: part.score(validation.parts[name]) for name, part in self._parts.items()}
        return self._join({name: scores for name, scores in found.items() if scores})

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what each task has."""
        found = {name: part.save() for name, part in self._parts.items()}
        tensors = {f"{name}/{key}": x for name, (kept, _) in found.items() for key, x in kept.items()}
        return tensors, {name: state for name, (_, state) in found.items()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Gives each task what it had."""
        for name, part in self._parts.items():
            own = {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}
            part.restore(own, state[name])
