"""The stack of the end-to-end tests, for the long runs, and a table of what they saw."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import api, own_api, pico_files, stack

__all__ = ["api", "own_api", "pico_files", "stack"]
OUT = Path(__file__).parents[2] / "bench" / "out" / "chaos.json"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table: what was done, how often, what was seen, and what should be."""

    def add(what: str, trials: int, seen: str, goal: str) -> None:
        row = {"what": what, "trials": trials, "seen": seen, "goal": goal}
        request.node.user_properties.append(("chaos", row))  # reaches the process that prints the table

    return add


@pytest.fixture
def scaled() -> Callable[[int], int]:
    """Scales the number of trials by STILLHOUSE_CHAOS_SCALE."""
    scale = float(os.environ.get("STILLHOUSE_CHAOS_SCALE", "1"))
    return lambda count: max(1, round(count * scale))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table and writes it as JSON."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    rows = [row for report in reports for name, row in report.user_properties if name == "chaos"]
    if not rows:
        return
    terminalreporter.section("chaos")
    for row in rows:
        terminalreporter.write_line(f"{row['what']}: {row['trials']} trials; {row['seen']} (goal: {row['goal']})")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1))
