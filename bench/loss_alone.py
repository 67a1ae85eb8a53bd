"""The last layer and the loss of a language model, as torch does it and in chunks: time and memory.

    python bench/loss_alone.py [--tokens N] [--hidden D] [--vocabulary C] [--out DIR]

Cross entropy and forward KL to a teacher with a last layer of the same size, from the hidden states to the gradients
of hidden states and layer. `dense` is torch's own losses on all logits at once; `ours` is `backward_through_head`. Each
runs in a process of its own, after a smaller run to warm up. Memory is what is resident at the worst moment beyond the
hidden states, the layers and their gradients. Prints a table, writes `loss_alone.json`, and fails when a goal is missed
or the two disagree.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.registry import list_methods
from worker.engine.objective import Objective, Term
from worker.kernels.heads import Head, HeadSignal, backward_through_head

TEMPERATURE = 2.0
GOALS = {"memory": 0.15, "time": 1.1}


def dense(student: Head, teacher: Head, labels_N: torch.Tensor) -> float:
    logits_NC = F.linear(*student)
    with torch.no_grad():
        soft_NC = F.log_softmax(F.linear(*teacher) / TEMPERATURE, -1)
    kl = F.kl_div(F.log_softmax(logits_NC / TEMPERATURE, -1), soft_NC, reduction="batchmean", log_target=True)
    loss = F.cross_entropy(logits_NC, labels_N) + TEMPERATURE**2 * kl
    loss.backward()
    return loss.item()


def ours(student: Head, teacher: Head, labels_N: torch.Tensor) -> float:
    losses = list_methods("losses")
    terms = [Term("cross_entropy", 1.0, losses["cross_entropy"]().build(None))]
    terms.append(Term("forward_kl", 1.0, losses["forward_kl"](temperature=TEMPERATURE).build(None)))
    return backward_through_head(student, Objective(terms), HeadSignal(teacher), labels_N, len(labels_N))["total"]


def resident(field: str) -> int:
    """Returns a figure of this process's memory in bytes: `VmRSS` now, or `VmHWM` at the worst moment (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure(which: str, num_tokens: int, width: int, num_classes: int) -> dict[str, float]:
    """Runs one of the two in this process; returns its seconds, its peak in bytes and figures of its gradients."""
    generator = torch.Generator().manual_seed(0)

    def head(count: int) -> Head:
        weight_CD = torch.randn(num_classes, width, generator=generator) / width**0.5
        return Head(torch.randn(count, width, generator=generator), weight_CD)

    run = {"dense": dense, "ours": ours}[which]
    few, teacher, student = head(8), head(num_tokens), head(num_tokens)
    labels_N = torch.randint(num_classes, (num_tokens,), generator=generator)
    for count in (8, num_tokens):
        hidden_ND = (few if count == 8 else student).hidden_ND.requires_grad_()
        weight_CD = student.weight_CD.requires_grad_()
        weight_CD.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark
        before = resident("VmRSS")
        began = time.perf_counter()
        loss = run(Head(hidden_ND, weight_CD), Head(teacher.hidden_ND[:count], teacher.weight_CD), labels_N[:count])
        seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before - hidden_ND.grad.nbytes - weight_CD.grad.nbytes
    norms = [hidden_ND.grad.norm().item(), weight_CD.grad.norm().item()]
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss, "by_hidden": norms[0], "by_weight": norms[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--only", choices=["dense", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    sizes = arguments.tokens, arguments.hidden, arguments.vocabulary
    if arguments.only:
        print(json.dumps(measure(arguments.only, *sizes)))
        return 0
    command = [sys.executable, __file__, "--tokens", str(sizes[0]), "--hidden", str(sizes[1])]
    command += ["--vocabulary", str(sizes[2]), "--only"]
    seen = {
        which: json.loads(subprocess.run([*command, which], check=True, stdout=subprocess.PIPE).stdout)
        for which in ("dense", "ours")
    }
    ratios = {
        "memory": seen["ours"]["peak_bytes"] / seen["dense"]["peak_bytes"],
        "time": seen["ours"]["seconds"] / seen["dense"]["seconds"],
    }
    agree = all(abs(seen["ours"][name] / seen["dense"][name] - 1) < 1e-3 for name in ("loss", "by_hidden", "by_weight"))
    table = Table("", "dense", "ours", "ratio", "goal", title=f"{sizes[0]:,} tokens × {sizes[1]:,} × {sizes[2]:,}")
    table.add_row(
        "seconds", *(f"{s['seconds']:.1f}" for s in seen.values()), f"{ratios['time']:.2f}", f"≤ {GOALS['time']}"
    )
    gigabytes = [f"{s['peak_bytes'] / 2**30:.2f}" for s in seen.values()]
    table.add_row("GB on top", *gigabytes, f"{ratios['memory']:.3f}", f"≤ {GOALS['memory']}")
    Console().print(table, f"{os.cpu_count()} cores; the two {'agree' if agree else 'DISAGREE'}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "loss_alone.json").write_text(json.dumps(seen | {"ratios": ratios, "agree": agree}, indent=1))
    return 0 if agree and all(ratios[name] <= goal for name, goal in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
