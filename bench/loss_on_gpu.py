"""The last layers and the forward KL of a language model on a GPU: time, memory, and how wrong the gradient is.

    python -m pip install liger-kernel
    python bench/loss_on_gpu.py [--tokens N] [--hidden D] [--vocabulary C] [--out DIR]

From the hidden states of teacher and student to the gradients of the student's hidden states and layer; the teacher is
near the student, as it is late in a training. `dense` is torch's own on all logits at once, in float32 and in bfloat16
as autocast has it; `liger` is LigerFusedLinearJSD (Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM
Training") with beta=0, in both; `ours` is `backward_through_head`. The error is that of the gradient of the first 256
hidden states, relative to float64. Memory is what is allocated at the worst moment beyond hidden states and layers.
Prints a table and writes `loss_on_gpu.json`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.registry import list_methods
from worker.engine.objective import Objective, Term
from worker.kernels.heads import Head, HeadSignal, backward_through_head

NUM_CHECKED, ROUNDS, SPREAD, GAP = 256, 5, 3.0, 0.02


def dense(student: Head, teacher: Head, dtype: torch.dtype) -> None:
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        logits_NC = F.linear(*student)
        with torch.no_grad():
            soft_NC = F.linear(*teacher)
    log_q_NC, log_p_NC = F.log_softmax(logits_NC.float(), -1), F.log_softmax(soft_NC.float(), -1)
    F.kl_div(log_q_NC, log_p_NC, reduction="batchmean", log_target=True).backward()


def liger(student: Head, teacher: Head, dtype: torch.dtype) -> None:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    parts = [x.to(dtype) for x in (student.hidden_ND, student.weight_CD, teacher.hidden_ND, teacher.weight_CD)]
    LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)(*parts, None).backward()


def ours(student: Head, teacher: Head, _: torch.dtype) -> None:
    loss = list_methods("losses")["forward_kl"](temperature=1.0)
    objective = Objective([Term("forward_kl", 1.0, loss.build(None))])
    labels_N = torch.zeros(len(student.hidden_ND), dtype=torch.int64, device="cuda")
    backward_through_head(student, objective, HeadSignal(teacher), labels_N, len(labels_N))


Run = Callable[[Head, Head, torch.dtype], None]
CONTENDERS: dict[str, tuple[Run, torch.dtype]] = {
    "dense, float32": (dense, torch.float32),
    "dense, bfloat16": (dense, torch.bfloat16),
    "liger, float32": (liger, torch.float32),
    "liger, bfloat16": (liger, torch.bfloat16),
    "ours": (ours, torch.float32),
}


def draw(num_tokens: int, width: int, num_classes: int) -> tuple[Head, Head]:
    """Returns student and teacher."""
    dice = torch.Generator("cuda").manual_seed(0)
    hidden_ND = torch.randn(num_tokens, width, device="cuda", generator=dice)
    weight_CD = torch.randn(num_classes, width, device="cuda", generator=dice) * SPREAD / width**0.5
    near = [x + GAP * x.std() * torch.randn(x.shape, device="cuda", generator=dice) for x in (hidden_ND, weight_CD)]
    return Head(hidden_ND, weight_CD), Head(*near)


def exact(student: Head, teacher: Head) -> Tensor:
    """Returns the gradient by the first hidden states, in float64."""
    logits_NC, soft_NC = (h.hidden_ND[:NUM_CHECKED].double() @ h.weight_CD.double().T for h in (student, teacher))
    gradient_NC = (logits_NC.softmax(-1) - soft_NC.softmax(-1)) / len(student.hidden_ND)
    return gradient_NC @ student.weight_CD.double()


def measure(run: Run, dtype: torch.dtype, student: Head, teacher: Head, exact_ND: Tensor) -> dict[str, float]:
    seconds = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        taught = Head(student.hidden_ND.detach().requires_grad_(), student.weight_CD.detach().requires_grad_())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        run(taught, Head(teacher.hidden_ND, teacher.weight_CD), dtype)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found_ND = taught.hidden_ND.grad[: len(exact_ND)].double()
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "error": ((found_ND - exact_ND).norm() / exact_ND.norm()).item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure; on a processor there is loss_alone.py")
        return 0
    student, teacher = draw(arguments.tokens, arguments.hidden, arguments.vocabulary)
    exact_ND = exact(student, teacher)
    table = Table("", "ms", "GB on top", "error of the gradient, %")
    seen = {}
    for name, (run, dtype) in CONTENDERS.items():
        if run is liger and find_spec("liger_kernel") is None:
            print(f"{name} is left out: liger-kernel is not installed")
            continue
        seen[name] = found = measure(run, dtype, student, teacher, exact_ND)
        cells = f"{1e3 * found['seconds']:.1f}", f"{found['peak_bytes'] / 1e9:.2f}", f"{100 * found['error']:.3f}"
        table.add_row(name, *cells)
    Console().print(
        table,
        torch.cuda.get_device_name(),
        f"{arguments.tokens:,} tokens × {arguments.hidden:,} × {arguments.vocabulary:,}",
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "loss_on_gpu.json").write_text(json.dumps(seen, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
