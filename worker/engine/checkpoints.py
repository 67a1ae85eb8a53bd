"""One file from which a training goes on, bit for bit: safetensors, with what is no tensor as JSON in its header."""

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from worker.engine.sharding import part_like

# A pause of sixty times what a checkpoint costs keeps that under 1.7 % of the time; the supervisor, which hashes and
# syncs it meanwhile, takes about as much of one core again.
COST_FACTOR = 60
FREE_RESERVE_BYTES = 64 * 1024 * 1024


class Pacer:
    """Says when the next checkpoint is due: not before the shortest pause, and never too often for what it costs.

    With a shortest pause of 0 it is due after every step.
    """

    def __init__(self, shortest_s: float) -> None:
        self._shortest_s = shortest_s
        self._due = time.monotonic() + shortest_s

    def is_due(self) -> bool:
        """Tells whether the time has come."""
        return time.monotonic() >= self._due

    def note(self, cost_s: float) -> None:
        """Sets the time of the next one, after one that cost so much."""
        self._due = time.monotonic() + (max(self._shortest_s, COST_FACTOR * cost_s) if self._shortest_s else 0)


def write(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint; the name appears only once the file is whole."""
    part = path.with_suffix(".part")
    try:
        save_file(_apart(tensors), part, metadata={"state": json.dumps(state, sort_keys=True)})
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what `write` was given, on the processor."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors named `<prefix>.<name>`, by name."""
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under `<prefix>.<name>`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the moments and step counts of every parameter, as `<index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Sets moments, step counts and the groups' settings."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = part_like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_tensors() -> dict[str, Tensor]:
    """Returns the state of every random generator: Python's, numpy's, torch's on the processor and on each GPU."""
    kind, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
        "gauss": torch.tensor([kind, gauss or 0.0, gauss is not None, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Sets every random generator back."""
    kind, gauss, gauss_set, has_gauss, cached = tensors["gauss"].tolist()
    random.setstate((int(kind), tuple(tensors["python"].tolist()), gauss if gauss_set else None))
    *keys, position = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        index = int(name.removeprefix("cuda_")) if name.startswith("cuda_") else torch.cuda.device_count()
        if index < torch.cuda.device_count():  # the machine before may have had more of them
            torch.cuda.set_rng_state(state, index)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors contiguous, and none of them sharing memory with another, as the format wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        address = whole.untyped_storage().data_ptr()
        result[name] = whole.clone() if address in seen else whole
        seen.add(address)
    return result
