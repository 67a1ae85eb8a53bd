"""Object ids as git would give them to a manifest, of whose files nothing but sha256 and size is known.

Every file counts as one that Git LFS keeps: what git sees of it is a pointer, a few lines that hold just these two.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from core.storage import ManifestFile

MODES = {False: b"100644", True: b"40000"}
Folder = dict[str, Any]  # of files and further folders, by name
IDENTITY = b"Stillhouse <> 0 +0000"  # no time: equal files are one commit, whenever they were made


class Entry(NamedTuple):
    """A file of a tree, or a folder, which has no `file`."""

    path: str
    oid: str
    file: ManifestFile | None


def pointer(file: ManifestFile) -> bytes:
    """Returns the text that git keeps in the file's place.

    Origin: the Git LFS specification, "The Pointer".
    """
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
        file.sha256.encode(),
        file.size_bytes,
    )


def blob_oid(file: ManifestFile) -> str:
    """Returns the id of the file's pointer."""
    return _oid(b"blob", pointer(file))


def list_entries(files: Iterable[ManifestFile]) -> list[Entry]:
    """Returns all folders and files, in git's order; the root comes first, with an empty path."""
    root: Folder = {}
    for file in files:
        *folders, name = file.path.split("/")
        folder = root
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[name] = file
    return _walk("", root)


def commit_oid(files: Iterable[ManifestFile]) -> str:
    """Returns the id of the commit that holds these files, has no parent, and tells of no time."""
    tree = list_entries(files)[0].oid.encode()
    return _oid(b"commit", b"tree %s\nauthor %s\ncommitter %s\n\nStillhouse\n" % (tree, IDENTITY, IDENTITY))


def _walk(path: str, folder: Folder) -> list[Entry]:
    """Returns the folder's own entry and those below it."""
    below: list[Entry] = []
    lines: list[bytes] = []
    for name, node in sorted(folder.items(), key=lambda item: _sorted_as(*item)):
        own = f"{path}/{name}" if path else name
        found = [Entry(own, blob_oid(node), node)] if isinstance(node, ManifestFile) else _walk(own, node)
        mode = MODES[found[0].file is None]
        lines.append(b"%s %s\0%s" % (mode, name.encode(), bytes.fromhex(found[0].oid)))
        below += found
    return [Entry(path, _oid(b"tree", b"".join(lines)), None), *below]


def _sorted_as(name: str, node: ManifestFile | Folder) -> bytes:
    """Git sorts a folder as if its name ended in a slash."""
    return name.encode() if isinstance(node, ManifestFile) else f"{name}/".encode()


def _oid(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0%s" % (kind, len(content), content), usedforsecurity=False).hexdigest()
