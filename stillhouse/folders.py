"""Where a local stack keeps its things, by one rule: never change a folder that we did not make."""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import IO

from stillhouse.processes import LocalError, Owner

SYSTEM_DIR = Path("/var/lib/stillhouse")
MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes, and Postgres adds nothing to the path we count


def default_data_dir() -> Path:
    """Returns the data folder for a user who names none; for root outside a home, which others can't enter."""
    if named := os.environ.get("STILLHOUSE_DATA_DIR"):
        return Path(named).expanduser().absolute()
    if os.geteuid() == 0:
        return SYSTEM_DIR
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "stillhouse"


def make_folder(folder: Path, mode: int) -> Path:
    """Returns the folder; only what is made here gets the mode, and what exists stays as it is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(mode=mode)
            path.chmod(mode)  # whatever the umask says
    except OSError as error:
        raise LocalError(f"Cannot make the folder {folder}: {error.strerror}. Name another with --data-dir.") from error
    if not folder.is_dir():
        raise LocalError(f"{folder} is a file, not a folder. Name another with --data-dir.")
    return folder


def take_lock(data_dir: Path) -> IO[str] | None:
    """Returns the lock on a data folder, held until it is closed; None while another process holds it."""
    lock = (data_dir / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def can_enter(folder: Path, owner: Owner) -> bool:
    """Tells whether that user can reach what lies in the folder, as the permissions stand."""
    return find_barrier(folder, owner) is None


def find_barrier(folder: Path, owner: Owner) -> Path | None:
    """Returns the outermost folder on the way that keeps that user out, or None."""
    way = [path for path in (*reversed(folder.parents), folder) if path.exists()]
    return next((path for path in way if not _may_search(path.stat(), owner)), None)


def _may_search(info: os.stat_result, owner: Owner) -> bool:
    if info.st_uid == owner.uid:
        return bool(info.st_mode & stat.S_IXUSR)
    if info.st_gid == owner.gid:
        return bool(info.st_mode & stat.S_IXGRP)
    return bool(info.st_mode & stat.S_IXOTH)


def place_for(folder: Path, owner: Owner | None) -> Path:
    """Returns where data of `owner` that belongs in `folder` can live: there, or under /var/lib if it can't enter.

    A note in `folder` remembers the other place, so that a deleted folder takes its old data's claim with it. Data stay
    where they are, whatever becomes of the permissions: a server that started elsewhere would start empty.

    Raises:
        LocalError: The user can't reach the data any more.
    """
    note = folder / "LOCATION"
    if note.exists():
        return Path(note.read_text().strip())
    barrier = None if owner is None else find_barrier(folder, owner)
    if barrier is None or owner is None:
        return folder
    if (folder / "data").exists():
        raise LocalError(
            f"The user '{owner.name}', as whom Postgres runs, can't enter {barrier} any more, and its data are in "
            f"{folder}. Let it through again: chmod o+x {barrier}"
        )
    make_folder(SYSTEM_DIR, 0o755)
    place = Path(tempfile.mkdtemp(prefix="elsewhere-", dir=SYSTEM_DIR))
    place.chmod(0o711)
    note.write_text(f"{place}\n")
    return place


def give(folder: Path, owner: Owner | None) -> Path:
    """Returns a private folder, made if it did not exist, that belongs to `owner`."""
    if not folder.exists():
        folder.mkdir(mode=0o700)
        if owner is not None:
            os.chown(folder, owner.uid, owner.gid)
    return folder


def socket_folder(wanted: Path, owner: Owner | None, longest_name: str) -> Path:
    """Returns a private folder for sockets: `wanted`, or one under the temporary folder if that path is too long."""
    if len(os.fsencode(wanted / longest_name)) <= MAX_SOCKET_PATH:
        return give(wanted, owner)
    name = "stillhouse-" + hashlib.sha256(os.fsencode(wanted)).hexdigest()[:12]
    uid = owner.uid if owner else os.geteuid()
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - private, and checked to be ours
        folder = parent / name
        if len(os.fsencode(folder / longest_name)) > MAX_SOCKET_PATH or (owner and not can_enter(parent, owner)):
            continue
        give(folder, owner)
        info = folder.lstat()
        if stat.S_ISDIR(info.st_mode) and info.st_uid == uid and stat.S_IMODE(info.st_mode) == 0o700:
            return folder
    raise LocalError(f"No place for a socket: the path {wanted} is too long, and the temporary folder does not serve.")


def reachable_copy(package: Path, libraries: Path, owner: Owner | None) -> Path:
    """Returns the programs' folder, or a copy of it under /var/lib when `owner` can't enter where it was installed."""
    if owner is None or can_enter(package, owner):
        return package
    info = package.stat()
    name = hashlib.sha256(f"{package}:{info.st_mtime_ns}".encode()).hexdigest()[:12]
    target = make_folder(SYSTEM_DIR / "programs", 0o755) / name
    if not target.exists():
        scratch = Path(tempfile.mkdtemp(prefix="copy-", dir=target.parent))
        scratch.chmod(0o755)
        shutil.copytree(package, scratch / package.parent.name / package.name)
        if libraries.exists():
            shutil.copytree(libraries, scratch / libraries.name)
        try:
            scratch.rename(target)
        except OSError:  # another start was faster
            shutil.rmtree(scratch)
    return target / package.parent.name / package.name
