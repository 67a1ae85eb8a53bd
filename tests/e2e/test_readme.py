"""The README's commands, run as they are printed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse import Client

ROOT = Path(__file__).parents[2]


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_commands_of_the_readme_work_as_printed(tmp_path: Path) -> None:
    start, walk = blocks("bash")
    assert start == "make setup\n.venv/bin/stillhouse up\n"
    checkout = tmp_path / "stillhouse"
    checkout.mkdir()
    (checkout / ".venv").symlink_to(sys.prefix)
    shutil.copytree(ROOT / "examples", checkout / "examples")
    train = checkout / "examples/tickets/train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[::3]))  # the same walk, sooner
    environment = os.environ | {"STILLHOUSE_DATA_DIR": str(tmp_path / "data")}
    environment.pop("STILLHOUSE_STORAGE_DIR")
    environment.pop("STILLHOUSE_STAGING_DIR")
    up = subprocess.Popen(
        [".venv/bin/stillhouse", "up", "--json"], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        ready = json.loads(up.stdout.readline())
        shell = ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run([*shell, walk], cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "late_delivery" in done.stdout
        page = (checkout / "build/tickets/report/report.html").read_text()
        assert "<svg" in page
        assert not re.search(r"""(src|href)=["']https?://""", page)

        with Client(ready["url"], ready["api_key"]) as client:
            job = next(iter(client.jobs.list(name="support-tickets")))
        keys = environment | {"URL": ready["url"], "KEY": ready["api_key"], "JOB": job.id}
        curl = next(block for block in blocks("console") if "curl" in block).replace("$ curl", "curl -sS")
        done = subprocess.run([*shell, curl], cwd=checkout, env=keys, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "event: done" in done.stdout
        assert shutil.which("curl")
        assert (checkout / "build/onnx_int8/model.onnx").is_file()

        for python in blocks("python"):
            done = subprocess.run(
                [sys.executable, "-c", python], cwd=checkout, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
        for folder in ("two-layers", "seed-1", "seed-2"):
            assert (checkout / f"build/{folder}/onnx/model.onnx").is_file()
    finally:
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_specs_are_valid_as_printed(page: str, tmp_path: Path) -> None:
    from core.jobs.spec import parse_spec
    from stillhouse.specs import load_spec

    for block in blocks("yaml", page):
        spec = parse_spec(block.encode())
        (tmp_path / "job.yaml").write_text(block)
        assert parse_spec(json.dumps(load_spec(tmp_path / "job.yaml")).encode()) == spec  # as the client sends it
        assert {problem.message for stage in spec.stages for problem in stage.advise(spec)} == set()
