"""What a model costs: bytes on disk, latency and throughput in its runtime."""

import json
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.blocks import Blocks
from worker.engine.data import Encoded
from worker.engine.inference import Answer, answer_rows

if TYPE_CHECKING:
    from worker.engine.runtimes import Forward  # whose import starts a thread

PARTS, TIMINGS = 5, 3
WARM_UP_RUNS = 5
THROUGHPUT_BATCH = 32
SPEED_BLOCKS = 8
SPEED_LOGITS = 2**28  # of a forward pass at most, which with a large vocabulary take more memory than the model
CPU = torch.device("cpu")


class Singles(Protocol):
    """A split from which single examples can be taken."""

    def __len__(self) -> int: ...

    def single(self, row: int) -> dict[str, Tensor]:
        """Returns the inputs of one example, a batch of one without padding."""


class Answers(NamedTuple):
    """A model's logits for a split, and how many texts a second it answered."""

    logits_NC: Tensor
    throughput_per_s: float


def count_bytes(folder: Path) -> int:
    """Returns the size of all files below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def count_weight_bytes(model: PreTrainedModel) -> int:
    """Returns the size of the file of a model's weights, safetensors, which need not be there, nor they be known."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in sorted(model.named_parameters()):
        begin, end = end, end + parameter.nbytes
        header[name] = {"dtype": "F32", "shape": [*parameter.shape], "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def answer_all(forward: "Forward", data: Encoded, between: Callable[[], None]) -> Answers:
    """Returns the logits of every row, in batches of 32 sorted by length; padding and tokenising are not timed."""
    batches, times_s = data.by_length(THROUGHPUT_BATCH, CPU), []
    forward(next(data.by_length(THROUGHPUT_BATCH, CPU)).inputs)

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        began = time.perf_counter()
        found = forward(inputs)
        times_s.append(time.perf_counter() - began)
        return torch.from_numpy(found)

    logits_NC = answer_rows(data, batches, answer, between)
    return Answers(logits_NC, len(data) / sum(times_s))


def time_singles(
    models: "Sequence[tuple[Forward | Answer, Singles]]", num_samples: int, between: Callable[[], None]
) -> list[dict[str, float]]:
    """Returns each model's median and 95th percentile of the latency at batch size 1, in milliseconds.

    The texts are spread evenly over the split, each without padding. Each is timed three times, of which the middle one
    counts, as a pause that the machine made is none of the model's. The models take turns, part of the texts after
    part, each with a warm-up, so that a busy moment falls on all of them.
    """
    rows = np.linspace(0, len(models[0][1]) - 1, num_samples).astype(np.int64)
    asked = [(forward, [data.single(row) for row in rows]) for forward, data in models]
    times_ms = np.empty((len(models), TIMINGS, num_samples))
    for timing, places in product(range(TIMINGS), np.array_split(np.arange(num_samples), PARTS)):
        for (forward, singles), found in zip(asked, times_ms[:, timing], strict=True):
            for place in places[:WARM_UP_RUNS]:
                forward(singles[place])
            for place in places:
                began = time.perf_counter()
                forward(singles[place])
                found[place] = (time.perf_counter() - began) * 1e3
            between()
    return [
        dict(zip(("latency_p50_ms", "latency_p95_ms"), np.percentile(found, [50, 95]).tolist(), strict=True))
        for found in np.median(times_ms, axis=1)
    ]


def as_forward(model: PreTrainedModel) -> "Forward":
    """Returns a language model as a function from inputs to logits."""

    def forward(inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits_BTV: NDArray[np.float32] = model(**inputs, use_cache=False).logits.float().numpy()
            return logits_BTV

    return forward


def measure_speed(forward: "Forward", data: Blocks, between: Callable[[], None]) -> float:
    """Returns how many tokens a second a language model reads in batches of eight blocks, or of what memory allows."""
    inputs = data.batch(np.arange(SPEED_BLOCKS) % len(data), CPU).inputs
    num_tokens = SPEED_LOGITS // forward({name: ids_BT[:1, :1] for name, ids_BT in inputs.items()}).shape[-1]
    length = min(num_tokens, data.max_length)
    inputs = {name: ids_BT[: max(1, num_tokens // length), :length] for name, ids_BT in inputs.items()}
    forward(inputs)
    between()
    began = time.perf_counter()
    forward(inputs)
    return inputs["input_ids"].numel() / (time.perf_counter() - began)
