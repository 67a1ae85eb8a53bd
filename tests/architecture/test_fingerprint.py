"""Whatever computes a stage's result is part of its key, so that no release takes over what an older one made."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from worker.fingerprint import LIBRARIES, ROOT, SOURCES

COMPUTING = ("worker/engine", "worker/kernels", "worker/methods")
OURS = {"core", "worker", "stillhouse"}
CHECKING_AND_WRITING = {"jinja2", "markupsafe", "pydantic", "pydantic_core", "yaml"}  # specs, and pages of a report


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_each_module_and_library_that_computes_is_in_the_key() -> None:
    names = {name for room in COMPUTING for path in (ROOT / room).rglob("*.py") for name in imported(path)}
    own = {name.replace(".", "/") for name in names if name.partition(".")[0] in OURS}
    assert {name for name in own if not name.startswith(SOURCES)} == set()
    libraries = {name.partition(".")[0] for name in names} - OURS - sys.stdlib_module_names
    assert libraries - {*LIBRARIES} == CHECKING_AND_WRITING
