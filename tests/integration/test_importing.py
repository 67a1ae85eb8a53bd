"""`stillhouse import openai`: from a server that speaks OpenAI's shapes, to this one."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from app.main import app
from stillhouse import cli
from tests.api import Api, jsonl, rows
from tests.serving import served

KEY = "sk-proj-abc"
FILES = {"file-train": jsonl(rows(30)), "file-valid": jsonl(rows(6, start=90)), "file-res": b"step,train_loss\n1,0.5\n"}


def _job(number: int, **changes: Any) -> dict[str, Any]:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}}
    return {
        "id": f"ftjob-{number}",
        "object": "fine_tuning.job",
        "model": "gpt-4o-mini-2024-07-18",
        "status": "succeeded",
        "training_file": "file-train",
        "validation_file": "file-valid" if number == 1 else None,
        "result_files": ["file-res"],
        "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.8},
        "seed": number,
        "metadata": {"team": "nlp"},
        "user_provided_suffix": f"job {number}",
        "method": method,
        **changes,
    }


class OpenAI:
    """Has four jobs, one a page; the file of one is gone, and another is of a method that is not known here."""

    def __init__(self) -> None:
        self.jobs = [_job(4, method={"type": "dpo"}), _job(3, training_file="file-gone"), _job(2), _job(1)]
        self.asked: Counter[str] = Counter()
        self.app = Starlette(
            routes=[
                Route("/v1/fine_tuning/jobs", self.list_jobs),
                Route("/v1/fine_tuning/jobs/{job}/events", self.list_events),
                Route("/v1/fine_tuning/jobs/{job}", self.get_job),
                Route("/v1/files/{file}/content", self.get_file),
            ]
        )

    def _page(self, request: Request, found: list[dict[str, Any]]) -> Response:
        self.asked[request.url.path] += 1
        if request.headers["authorization"] != f"Bearer {KEY}":
            error = {"message": "Incorrect API key", "type": "invalid_request_error", "param": None, "code": "invalid"}
            return JSONResponse({"error": error}, 401)
        after = request.query_params.get("after")
        start = next((n + 1 for n, one in enumerate(found) if one["id"] == after), 0)
        shown = found[start : start + 1]
        return JSONResponse({"object": "list", "data": shown, "has_more": start + 1 < len(found)})

    async def list_jobs(self, request: Request) -> Response:
        return self._page(request, self.jobs)

    async def list_events(self, request: Request) -> Response:
        return self._page(request, [{"id": f"ftevent-{n}", "message": f"step {n}"} for n in (3, 2, 1)])

    async def get_job(self, request: Request) -> Response:
        found = next((job for job in self.jobs if job["id"] == request.path_params["job"]), None)
        return JSONResponse(found) if found else JSONResponse({"error": {"message": "no such job", "code": None}}, 404)

    async def get_file(self, request: Request) -> Response:
        """One of the files lies elsewhere, where no key is to be sent."""
        if request.path_params["file"] == "file-train" and "authorization" in request.headers:
            return RedirectResponse("?signature=abc", 302)
        self.asked[request.path_params["file"]] += 1
        data = FILES.get(request.path_params["file"])
        return Response(data) if data else JSONResponse({"error": {"message": "no such file", "code": None}}, 404)


@pytest.fixture
def source(api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OpenAI]:
    there = OpenAI()
    with served(there.app) as theirs, served(app) as ours:
        monkeypatch.chdir(tmp_path)
        for name, value in {
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": f"{theirs}/v1",
            "STILLHOUSE_URL": ours,
            "STILLHOUSE_API_KEY": api.key,
        }.items():
            monkeypatch.setenv(name, value)
        yield there


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stillhouse", "import", "openai", *arguments])
    return cli._run()


def test_jobs_come_with_files_events_and_results(
    api: Api, source: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["ftjob-4", "ftjob-3", "ftjob-2", "ftjob-1"]
    assert "file-gone: is not there any more" in err
    events = [json.loads(line)["message"] for line in Path("openai/ftjob-1/events.jsonl").read_text().splitlines()]
    assert events == ["step 1", "step 2", "step 3"]
    assert json.loads(Path("openai/ftjob-1/job.json").read_text()) == source.jobs[-1]
    assert Path("openai/ftjob-1/results-file-res.csv").read_bytes() == FILES["file-res"]
    assert not Path("openai/ftjob-3/request.json").exists()
    request = json.loads(Path("openai/ftjob-1/request.json").read_text())
    for field, file_id in (("training_file", "file-train"), ("validation_file", "file-valid")):
        assert api("GET", f"/openai/v1/files/{request[field]}/content").content == FILES[file_id]
    assert source.asked["file-train"] == 1  # three jobs learned from it
    assert len(api("GET", "/openai/v1/files").json()["data"]) == 2
    assert api("GET", "/v1/jobs").json()["data"] == []


def test_jobs_are_made_here_once(api: Api, source: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    api.push_model()
    for _ in range(2):
        assert _run(monkeypatch, "--submit", "minilm") == 0
    made = api("GET", "/openai/v1/fine_tuning/jobs").json()["data"]
    assert [(job["model"], job["seed"], job["stillhouse"]["native_status"]) for job in made] == [
        ("minilm", 1, "queued"),
        ("minilm", 2, "queued"),
    ]
    spec = api("GET", f"/v1/jobs/{made[0]['stillhouse']['job_id']}").json()["spec"]
    assert (spec["name"], spec["metadata"], spec["stages"][0]["epochs"]) == ("job 1", {"team": "nlp"}, 2)
    assert (source.asked["file-train"], len(api("GET", "/openai/v1/files").json()["data"])) == (1, 2)


def test_one_job_is_brought(source: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, "--job", "ftjob-2", "--to", "one") == 0
    assert sorted(path.name for path in Path("one").iterdir()) == ["files", "files.json", "ftjob-2"]
    assert _run(monkeypatch, "--job", "ftjob-9", "--to", "one") == 3


def test_a_key_that_is_not_theirs_is_told(
    source: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert _run(monkeypatch) == 4
    assert "Incorrect API key" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert _run(monkeypatch) == 4
    assert "set OPENAI_API_KEY" in capsys.readouterr().err


def test_ids_that_lead_elsewhere_are_refused(source: OpenAI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source.jobs = [_job(1, id="../../outside")]
    assert _run(monkeypatch) == 2
    source.jobs = [_job(1, result_files=["../../../outside"])]
    assert _run(monkeypatch) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["openai"]
