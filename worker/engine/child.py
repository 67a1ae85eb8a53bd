"""What the process of one stage does, from its order to its last report.

It has no database, and no network but the loopback, over which the processes of one training talk. Orders come as JSON
lines on stdin, reports leave on the file descriptor, and what is logged (with the stack trace of a failure) goes to
stderr, which is the stage's log; SIGUSR1 writes the stacks of all threads there.
"""

import ctypes
import faulthandler
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StageFailed
from core.memory import has_filled_memory
from worker.engine.failures import CheckpointUnfit, StopRequested, explain
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter

if TYPE_CHECKING:
    from worker.engine.context import Order

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
log = logging.getLogger("worker.engine.child")


def run_stage(order: Path, report_fd: int) -> int:
    """Runs the stage of the order; returns the exit status, 0 for a result or an ordered stop, 1 for a failure."""
    from worker.engine import ranks  # torch, which may not be imported before its environment is set

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ranks.fork_others(order, report_fd)
    logging.getLogger("worker").setLevel(logging.WARNING if ranks.number() else logging.INFO)
    reporter, stop, mailbox = Reporter(report_fd), threading.Event(), Mailbox()
    threading.Thread(target=listen, args=(sys.stdin.fileno(), stop, mailbox), daemon=True).start()
    last = run(order, reporter, stop, mailbox)
    try:
        reporter.close(last)
    except BrokenPipeError:
        log.error("nobody reads the reports any more")
        return 1
    return 0 if last["type"] != "error" else 1


def run(path: Path, reporter: Reporter, stop: threading.Event, mailbox: Mailbox) -> dict[str, Any]:
    """Returns the last report of the stage: result, stopped or error."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        from worker.engine import ranks
        from worker.engine.context import Order, StageContext
        from worker.engine.devices import configure_torch

        configure_torch(ranks.num_threads(data["num_threads"]), deterministic_gpu=data["spec"]["deterministic"])
        ranks.join(path.parent)
        order = Order.parse(data)
        ctx = StageContext(order, reporter, stop, mailbox)
        tempfile.tempdir = str(ctx.scratch_dir)  # what libraries put aside goes the same way
        try:
            limit_memory(order)
            log.info("stage %s starts on %s", order.stage.kind, ctx.device)
            summary = order.stage.build(ctx)()
        finally:
            ctx.close()
    except StopRequested:
        log.info("stopped by order")
        return {"type": "stopped"}
    except CheckpointUnfit as error:
        log.exception("the checkpoint does not fit")
        return {"type": "unfit", "message": str(error)[:300]}
    except BaseException as error:  # whatever it is, the supervisor must hear of it
        log.exception("the stage failed")
        return explain(error)
    return {"type": "result", "summary": summary}


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, and leaves at once when the parent died before that."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Has the kernel give this process the children of those that it forked and that are dead, to be waited for."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def listen(fd: int, stop: threading.Event, mailbox: Mailbox) -> None:
    """Reads orders until the pipe closes."""
    rest = b""
    while chunk := os.read(fd, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            try:
                order = json.loads(line)
                name = order["order"]
            except (ValueError, KeyError, TypeError):
                log.warning("not an order: %r", line[:200])
                continue
            if name == "stop":
                stop.set()
            elif name == "answer":
                mailbox.put(order)
            else:
                log.warning("unknown order %r", name)


def set_environment(num_threads: int) -> None:
    """Sets what the numeric libraries read in the environment when they are first imported.

    OpenMP's threads spin for a moment at barriers, then sleep. Measured on two virtual cores: to sleep at once makes a
    training step a fifth slower, and to spin as long as is the default makes it twice as slow beside another busy
    process. BLAS below numpy computes nothing here, and its threads would not survive a fork.
    """
    threads = str(num_threads)
    os.environ.update(
        OMP_NUM_THREADS=threads,
        GOMP_SPINCOUNT="1000",
        MKL_NUM_THREADS=threads,
        OPENBLAS_NUM_THREADS="1",
        RAYON_NUM_THREADS=threads,
        TOKENIZERS_PARALLELISM="true",
        HF_HUB_OFFLINE="1",
        GLOO_SOCKET_IFNAME="lo",
        TRANSFORMERS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        MPLBACKEND="svg",
        PYTORCH_NVML_BASED_CUDA_CHECK="1",  # CUDA's own check would have to be made after the fork
    )


def limit_memory(order: "Order") -> None:
    """Limits this process's address space; with CUDA, which reserves far more than it uses, only its data.

    Raises StageFailed where the libraries alone take nearly all of it: they would fail in odd ways.
    """
    from worker.engine.devices import choose_device

    if order.max_memory_bytes:
        kind = resource.RLIMIT_AS if choose_device().type == "cpu" else resource.RLIMIT_DATA
        resource.setrlimit(kind, (order.max_memory_bytes, order.max_memory_bytes))
        if has_filled_memory(os.getpid()):
            limit = f"STILLHOUSE_MAX_CHILD_MEMORY_BYTES, {order.max_memory_bytes:,}"
            message = f"The libraries of a stage alone take nearly all of the address space that it may have ({limit})."
            raise StageFailed("out_of_memory", message, suggestion="Have the operator raise it, or set it to 0.")
