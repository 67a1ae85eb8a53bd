"""Processes of one machine that train one model together, or answer for it.

Each runs the whole stage with a copy of the model and draws the same batches. Of a training step each computes the
gradient of its share of the examples, divided by the rows of the whole step; their sum, which all get, is the gradient
that one process would have computed, so the copies stay the same. The first one alone reports, writes and hears orders.

Paper: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 2.3.
"""

import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from core.jobs.spec import JobSpec
from core.registry import list_methods
from worker.engine.child import die_with_parent
from worker.engine.data import Batch

BUCKET_ELEMENTS = 2**23  # of gradients that are summed at once, 32 MB
TIMEOUT = timedelta(hours=1)  # the supervisor notices much earlier that nothing goes on
T = TypeVar("T")

_number, _count = 0, 1


def number() -> int:
    """Returns which of the processes this is, 0 for the first."""
    return _number


def count() -> int:
    """Returns how many there are."""
    return _count


def num_threads(wanted: int) -> int:
    """Returns this process's share of so many threads; 0 is one a core."""
    return max(1, (wanted or len(os.sched_getaffinity(0))) // _count)


def fork_others(order: Path, report_fd: int) -> None:
    """Forks the other processes of a stage that shares its work; they return from here, too, deaf and mute.

    No thread may run yet. The others are of this one's process group and die with it.
    """
    global _number, _count
    data = json.loads(order.read_text(encoding="utf-8"))
    if data["num_processes"] == 1:
        return
    stage = list_methods("stages")[data["stage"]["kind"]].model_validate(data["stage"])
    if not stage.shares_work(JobSpec.model_validate(data["spec"])):  # type: ignore[attr-defined]
        return
    first, _count = os.getpid(), data["num_processes"]
    for other in range(1, _count):
        if os.fork() == 0:
            die_with_parent(first)
            _number = other
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in (0, report_fd):
                os.dup2(nowhere, fd)
            os.close(nowhere)
            return


def join(folder: Path) -> None:
    """Has the processes find each other by a file in a folder that all know."""
    if _count == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(_number)
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=distributed.FileStore(str(folder / "rendezvous"), _count),  # type: ignore[attr-defined]
        rank=_number,
        world_size=_count,
        timeout=TIMEOUT,
    )


def turns(items: Iterable[T], *, in_step: bool = False) -> Iterator[tuple[T, bool]]:
    """Yields what comes to this process in turn, and that it does.

    In step, every process gets as many: where they do not suffice, one that is another's.
    """
    left = iter(items)
    while turn := [*islice(left, _count)]:
        if _number < len(turn):
            yield turn[_number], True
        elif in_step:
            yield turn[0], False


def share(batches: Iterable[Batch], *, in_step: bool = False) -> Iterator[Batch]:
    """Yields the batches whose turn it is in this process; in step, those of others without their rows."""
    for batch, is_mine in turns(batches, in_step=in_step):
        yield batch if is_mine else batch.without_rows()


def seed_step(seed: int, step: int) -> None:
    """Lets what a step draws, as dropout, depend on nothing but seed, step and process, where there are several."""
    if _count > 1:
        torch.manual_seed((seed * 2**20 + step) * _count + _number)


def add_up(tensor: Tensor) -> Tensor:
    """Returns the sum over the processes, in the place of the tensor; all must call it, with the same shape."""
    if _count > 1:
        distributed.all_reduce(tensor)
    return tensor


def hand_over(rows: Iterable[Tensor], device: torch.device) -> None:
    """Gives the first process, in tensors that are 0 where others have filled them in, what these have."""
    if _count > 1:
        for tensor in rows:
            whole = tensor.clone().to(device)
            distributed.reduce(whole, 0)
            if _number == 0:
                tensor.copy_(whole)


def add_up_numbers(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """Returns the sums of numbers that every process has by the same names, in the same order."""
    if _count == 1:
        return numbers
    sums = add_up(torch.tensor([*numbers.values()], dtype=torch.float64, device=device))
    return dict(zip(numbers, sums.tolist(), strict=True))


def add_up_gradients(parameters: Iterable[Parameter]) -> None:
    """Gives each parameter the sum of its gradients; one that has none in any process keeps none.

    Those of split layers are summed already.
    """
    if _count == 1:
        return
    trained = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    has_one = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    bucket: list[Parameter] = []
    size = 0
    for parameter, total in zip(trained, add_up(has_one).tolist(), strict=True):
        if not total:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter)
        size += parameter.numel()
        if size >= BUCKET_ELEMENTS:
            _add_up_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _add_up_bucket(bucket)


def _add_up_bucket(bucket: list[Parameter]) -> None:
    gradients = [p.grad for p in bucket if p.grad is not None]
    whole = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
