"""`stillhouse fsck`, `backup` and `restore` as an operator types them: beside a server, and on a data folder."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

import migrations
from core.storage import ArtifactStore
from stillhouse.processes import wait_until
from tests import pico
from tests.integration.test_local_stack import Up, children
from tests.integration.test_upkeep_backup import fill
from tests.upkeep import empty_database, flip

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stillhouse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=CLEAN | env)


def address(engine: Engine, storage: Path) -> dict[str, str]:
    url = engine.url.render_as_string(hide_password=False)
    return {"STILLHOUSE_DATABASE_URL": url, "STILLHOUSE_STORAGE_DIR": str(storage)}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    with empty_database(monkeypatch) as engine:
        migrations.upgrade()
        fill(ArtifactStore(tmp_path / "storage"))
        yield address(engine, tmp_path / "storage")


def test_exit_codes_and_words_on_a_server(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "storage")
    clean = run(server, "fsck")
    assert (clean.returncode, clean.stdout) == (0, ""), clean.stderr
    assert "No problems." in clean.stderr
    made = run(server, "backup", str(tmp_path / "dest"), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["revision"] == migrations.head()
    occupied = run(server, "restore", str(tmp_path / "dest"))
    assert (occupied.returncode, occupied.stdout) == (2, "")
    assert "the table tenants has rows" in occupied.stderr

    sha256 = store.put_bytes(b"student").sha256
    flip(store.path_of(sha256))
    assert run(server, "fsck", "--quick").returncode == 0
    wrong = run(server, "fsck", "--repair", "--json")
    report: dict[str, Any] = json.loads(wrong.stdout)
    assert (wrong.returncode, report["counts"], report["num_put_aside"]) == (1, {"damaged": 1}, 1)
    table = run(server, "fsck")
    assert table.returncode == 1
    assert "artifact job_" in table.stdout
    assert run(server, "backup", str(tmp_path / "dest")).returncode == 0  # it has those bytes already
    poorer = run(server, "backup", str(tmp_path / "new"))
    assert poorer.returncode == 1
    assert sha256 in poorer.stderr

    with empty_database(monkeypatch) as engine:
        other = address(engine, tmp_path / "other")
        name = json.loads(made.stdout)["name"]
        back = run(other, "restore", str(tmp_path / "dest"), "--name", name, "--json")
        assert back.returncode == 0, back.stderr
        assert json.loads(back.stdout)["is_clean"]
        assert run(other, "fsck").returncode == 0


def test_what_is_not_there_is_said(server: dict[str, str], tmp_path: Path) -> None:
    nothing = run(server, "restore", str(tmp_path / "nowhere"))
    assert nothing.returncode == 2
    assert "no whole backup" in nothing.stderr
    nobody = run({"STILLHOUSE_DATA_DIR": str(tmp_path / "nobody")}, "fsck")
    assert nobody.returncode == 2
    assert "There is no Stillhouse in" in nobody.stderr
    assert not (tmp_path / "nobody").exists()
    away = run(server | {"STILLHOUSE_DATABASE_URL": "postgresql+psycopg://127.0.0.1:1/x"}, "fsck")
    assert (away.returncode, away.stdout) == (5, "")
    assert "Traceback" not in away.stderr


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that Postgres' own user can enter."""
    with tempfile.TemporaryDirectory(prefix="sh-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_data_folder_is_backed_up_while_it_runs_and_comes_back(folder: Path, tmp_path: Path) -> None:
    up = Up(folder / "data", "--workers", "0")
    try:
        key = {"Authorization": f"Bearer {up.facts['api_key']}"}
        data = pico.write_data(tmp_path / "rows")
        files = {split: (path.name, path.read_bytes()) for split, path in data.items()}
        url = f"{up.facts['url']}/v1/datasets"
        assert httpx.post(url, data={"name": "toy"}, files=files, headers=key).status_code == 201
        assert run({}, "fsck", "--data-dir", str(up.folder)).returncode == 0
        made = up.cli("backup", str(folder / "dest"), "--json")
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["blobs"]["num_rows"] == 3
    finally:
        up.end(signal.SIGTERM)
    assert up.cli("fsck").returncode == 0  # also when it does not run
    back = run({}, "restore", str(folder / "dest"), "--data-dir", str(folder / "again"))
    assert back.returncode == 0, back.stderr
    again = Up(folder / "again", "--workers", "0")
    try:
        answer = httpx.get(
            f"{again.facts['url']}/v1/datasets/toy",
            headers={"Authorization": f"Bearer {again.facts['api_key']}"},
        )
        assert answer.status_code == 200
        assert set(answer.json()["splits"]) == set(data)
    finally:
        again.end(signal.SIGTERM)
    assert wait_until(lambda: not children(folder), 20)


def test_a_folder_whose_stack_uses_a_server_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    stack = {"pid": os.getpid(), "url": "http://127.0.0.1:1", "postgres_dir": None}
    (tmp_path / "stack.json").write_text(json.dumps(stack))
    said = run({}, "fsck", "--data-dir", str(tmp_path))
    assert said.returncode == 2
    assert "set STILLHOUSE_DATABASE_URL" in said.stderr
