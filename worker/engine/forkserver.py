"""Imports the libraries once and forks every stage's process from itself, so that a stage starts at once.

`python -m worker.engine.forkserver --fd N --num-threads M`. N is a socket to the owner. Each message on it is the path
of an `order.json`; with it come four file descriptors: the stage's standard input, its log, its report pipe, and a pipe
on which its exit code is written once nothing of its process group is left. The answer is the process id. When the
socket closes, the owner is gone, and everything ends.
"""

import argparse
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from core.jobs.spec import JobSpec
from core.registry import list_methods
from worker.engine.child import adopt_orphans, die_with_parent, run_stage, set_environment

MAX_MESSAGE_BYTES = 64 * 1024
PRELOADED = (
    "transformers.generation",
    "transformers.loss.loss_utils",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "worker.engine.distillation",
    "worker.engine.finetuning",
    "worker.engine.language",
    "worker.engine.multitask",
    "worker.engine.rendering",
)  # not onnxruntime: its import starts a thread
log = logging.getLogger("worker.engine.forkserver")


def main(argv: list[str] | None = None) -> int:
    """Serves until the owner is gone."""
    parser = argparse.ArgumentParser(prog="worker.engine.forkserver")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--num-threads", type=int, required=True)
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the owner, which orders the stages to stop
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    adopt_orphans()
    set_environment(args.num_threads)
    preload()
    with socket.socket(fileno=args.fd) as owner:
        Server(owner).serve()
    return 0


def preload() -> None:
    """Imports and builds what every stage needs. No thread and no GPU may be in use yet: neither survives a fork."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    from worker.engine.objective import LOSS

    LOSS.rebuild()
    JobSpec.model_rebuild()
    for stage in list_methods("stages").values():
        stage.model_rebuild()
    with suppress(ImportError):  # no promise of the library's: it saves a stage's first load a tenth of a second
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("")  # compiles the patterns of all models, and keeps them

    if len(os.listdir("/proc/self/task")) > 1 or torch.cuda.is_initialized():
        log.warning("a library started threads or the GPU on import; stages may hang")
    gc.collect()
    gc.freeze()  # collections in a stage leave these pages shared


class Server:
    """Forks stages, and tells when they end."""

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._stages: dict[int, tuple[int, int]] = {}  # pidfd: process id, where its exit code goes

    def serve(self) -> None:
        """Answers orders until the owner is gone, then kills what is left."""
        try:
            while True:
                ready, _, _ = select.select([self._owner.fileno(), *self._stages], [], [])
                for fd in ready:
                    if fd in self._stages:
                        self._reap(fd)
                    elif not self._answer():
                        return
        finally:
            for pid, _ in self._stages.values():
                _kill_group(pid)

    def _answer(self) -> bool:
        """Forks one stage; returns whether the owner is still there."""
        try:
            data, fds, _, _ = socket.recv_fds(self._owner, MAX_MESSAGE_BYTES, 4)
        except ConnectionResetError:
            return False
        if not data:
            return False
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            self._become_stage(server, Path(os.fsdecode(data)), fds)
        *stage_fds, exit_fd = fds
        for fd in stage_fds:
            os.close(fd)
        self._stages[os.pidfd_open(pid)] = pid, exit_fd
        self._owner.send(str(pid).encode())
        return True

    def _reap(self, pidfd: int) -> None:
        """Kills what an ended stage left in its process group, before the id can be another's; tells the exit code."""
        pid, exit_fd = self._stages.pop(pidfd)
        os.close(pidfd)
        _kill_group(pid)
        _, status = os.waitpid(pid, 0)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-pid, 0)  # what is left of its group, which we have adopted
        with suppress(BrokenPipeError):
            os.write(exit_fd, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(exit_fd)

    def _become_stage(self, server: int, order: Path, fds: list[int]) -> NoReturn:
        """Runs the stage in this new process and leaves with its exit code."""
        code = 1
        try:
            os.setsid()
            die_with_parent(server)
            stdin, stage_log, reports, exit_fd = fds
            for fd, target in ((stdin, 0), (stage_log, 1), (stage_log, 2)):
                os.dup2(fd, target)
            for fd in (stdin, stage_log, exit_fd, self._owner.detach(), *self._stages):
                os.close(fd)
            for _, fd in self._stages.values():
                os.close(fd)
            os.chdir(order.parent)
            code = run_stage(order, reports)
        except BaseException:
            log.exception("the stage's process failed")
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)  # nothing of the server may run again here


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
