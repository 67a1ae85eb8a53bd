"""What a client of the Hub needs of an answer, as measured with three major versions."""

import re
from collections.abc import Mapping

ERRORS = {
    401: {"RepoNotFound"},
    403: {"GatedRepo"},
    404: {"RepoNotFound", "RevisionNotFound", "EntryNotFound"},
}
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOS = re.compile(r"/hub/(api/(models|datasets)/|.*/resolve/)")


def lint(method: str, path: str, status: int, headers: Mapping[str, str]) -> list[str]:
    """Returns what an answer about a repository lacks: without it clients end in an error, or in another one."""
    if not REPOS.match(path):
        return []
    found = {name.lower(): value for name, value in headers.items()}
    error = found.get("x-error-code", "")
    wanted: list[str] = []
    if "/resolve/" in path and (status < 400 or error == "EntryNotFound"):
        wanted += ["x-repo-commit"]
    if "/resolve/" in path and status < 400:
        wanted += ["etag"]
    if "/resolve/" in path and status == 200:
        wanted += ["accept-ranges", "content-length"]
    lacks = [name for name in wanted if not found.get(name)]
    if status in ERRORS and error not in ERRORS[status]:
        lacks.append("x-error-code")
    if not COMMIT.fullmatch(found.get("x-repo-commit", "0" * 40)):
        lacks.append("a commit of 40 digits")
    return [f"{method} {path}: {status} without {name}" for name in lacks]
