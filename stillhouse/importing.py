"""Brings fine-tuning jobs and their files over from OpenAI, into a folder and to this server."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stillhouse.errors import InvalidInput, NotFound
from stillhouse.forms import Sync, run
from stillhouse.transport import Transport

ASKED_FOR = ("training_file", "validation_file")
MAPPED = "files.json"  # of the folder: what each file is called here
SUBMITTED = "submitted.json"
PAGE = 100
ID = re.compile(r"[A-Za-z0-9][\w-]{0,99}")


class OpenAIImport:
    """What is brought over; whatever is in the folder by then is not asked for again.

    Args:
        source: OpenAI.
        target: The door for its client at this server.
        folder: Has `files/` and a folder for each job, with `job.json`, `events.jsonl`, `results-*.csv`, and
            `request.json`, which makes the same job here.
        say: Is told of each step.
    """

    def __init__(
        self, source: Transport[Sync], target: Transport[Sync], folder: Path, say: Callable[[str], None]
    ) -> None:
        self.source, self.target, self.folder, self.say = source, target, folder, say
        (folder / "files").mkdir(parents=True, exist_ok=True)

    def list_jobs(self) -> Iterator[dict[str, Any]]:
        """Yields all jobs, newest first."""
        return self._pages("/fine_tuning/jobs")

    def get_job(self, job_id: str) -> dict[str, Any]:
        """Returns a job. Raises NotFound."""
        return dict(run(self.source.json("GET", f"/fine_tuning/jobs/{job_id}")))

    def bring(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Brings a job over, and returns the request that makes it here; None where its files are gone there."""
        place = self.folder / _safe(job["id"])
        place.mkdir(exist_ok=True)
        _write(place / "job.json", json.dumps(job, indent=1))
        events = list(self._pages(f"/fine_tuning/jobs/{job['id']}/events"))
        _write(place / "events.jsonl", "".join(json.dumps(event) + "\n" for event in reversed(events)))
        for file_id in job.get("result_files") or []:
            self._try_download(file_id, place / f"results-{_safe(file_id)}.csv")
        files = {field: self._bring_file(job[field]) for field in ASKED_FOR if job.get(field)}
        if None in files.values():
            return None
        request = _request(job) | files
        _write(place / "request.json", json.dumps(request, indent=1))
        return request

    def submit(self, job_id: str, request: dict[str, Any], model: str) -> str:
        """Makes the job here, of another model, and returns its id; one that was made before is not made twice."""
        place = self.folder / job_id / SUBMITTED
        if place.exists():
            return str(json.loads(place.read_text())["id"])
        headers = {"Idempotency-Key": f"import-{job_id}-{model}"}
        body = request | {"model": model}
        made = run(self.target.json("POST", "/fine_tuning/jobs", json=body, headers=headers, repeatable=True))
        _write(place, json.dumps({"id": made["id"], "model": model}))
        return str(made["id"])

    def _bring_file(self, file_id: str) -> str | None:
        """Returns what a file is called here."""
        known = self._known()
        if file_id in known:
            return known[file_id]
        path = self.folder / "files" / f"{_safe(file_id)}.jsonl"
        if not path.exists() and not self._try_download(file_id, path):
            return None
        with path.open("rb") as data:
            files = {"file": (path.name, data)}
            sent = run(self.target.json("POST", "/files", data={"purpose": "fine-tune"}, files=files))
        self.say(f"file {file_id}: {path.stat().st_size:,} bytes, here {sent['id']}")
        _write(self.folder / MAPPED, json.dumps(known | {file_id: sent["id"]}, indent=1))
        return str(sent["id"])

    def _known(self) -> dict[str, str]:
        place = self.folder / MAPPED
        return dict(json.loads(place.read_text())) if place.exists() else {}

    def _try_download(self, file_id: str, path: Path) -> bool:
        """Downloads a file; one that is gone there is told of, and no more."""
        part = path.with_name(f"{path.name}.part")
        try:
            run(self._download(file_id, part))
        except NotFound:
            part.unlink(missing_ok=True)
            self.say(f"file {file_id}: is not there any more")
            return False
        part.replace(path)
        return True

    async def _download(self, file_id: str, part: Path) -> None:
        async with self.source.file(f"/files/{file_id}/content") as answer:
            with part.open("wb") as file:
                async for chunk in self.source.form.chunks(answer):
                    file.write(chunk)

    def _pages(self, path: str) -> Iterator[dict[str, Any]]:
        query: dict[str, Any] = {"limit": PAGE}
        while True:
            page = run(self.source.json("GET", path, params=query))
            try:
                yield from page["data"]
                if not page["has_more"] or not page["data"]:
                    return
                query["after"] = page["data"][-1]["id"]
            except (KeyError, TypeError) as error:
                raise InvalidInput(f"{self.source.url}{path} does not answer as OpenAI does.") from error


def _request(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the request that a job was made by, as far as it can be told, but for its files."""
    settings = {name: value for name, value in (job.get("hyperparameters") or {}).items() if value is not None}
    kind = (job.get("method") or {}).get("type", "supervised")
    request: dict[str, Any] = {"model": job["model"], "method": {"type": kind, kind: {"hyperparameters": settings}}}
    suffix = job.get("user_provided_suffix")
    if suffix:
        request["suffix"] = suffix
    kept = {name: job[name] for name in ("seed", "metadata") if job.get(name)}
    return request | kept


def _safe(name: str) -> str:
    """Returns an id that is to be a file's name. Raises InvalidInput for one that could lead elsewhere."""
    if not ID.fullmatch(name):
        raise InvalidInput(f"'{name[:100]}' is no id that OpenAI gives.")
    return name


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
