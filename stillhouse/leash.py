"""Starts a program that dies with its parent: `leash.py PARENT_PID SIGNAL UID:GID PROGRAM [ARGUMENT ...]`.

It is a program of its own, run before the real one takes its place, because the order matters: the kernel forgets the
parent-death signal on a change of user, and code between fork and exec of a process with threads may deadlock.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, signal_number: int, owner: str, program: list[str]) -> None:
    """Becomes `program` in a session of its own, as `owner` if one is given, tied to the life of the parent."""
    os.setsid()
    if owner != "-":
        uid, gid = (int(part) for part in owner.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the kernel knew that we care
            sys.exit(1)
    os.execv(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
