"""The query by which workers are scaled counts the jobs that need one."""

from pathlib import Path

import pytest
import yaml
from sqlalchemy import text

from core.db import session_scope
from core.jobs.models import Job
from tests.api import Api, claim_job

SCALING = Path(__file__).parents[2] / "deploy" / "kubernetes" / "scaling.yaml"
QUERIES = {
    found["metadata"]["name"].removeprefix("worker-"): found["spec"]["triggers"][0]["metadata"]["query"]
    for found in yaml.safe_load_all(SCALING.read_text())
    if found["kind"] == "ScaledObject"
}


def _count(queue: str) -> int:
    with session_scope() as session:
        return int(session.execute(text(QUERIES[queue])).scalar_one())


@pytest.mark.parametrize("queue", sorted(QUERIES))
def test_jobs_that_wait_and_run_are_counted(api: Api, queue: str) -> None:
    before = _count(queue)
    jobs = [api.make_job() for _ in range(4)]
    waiting, running, cancelled, paused = jobs
    claim_job(running)
    api("POST", f"/v1/jobs/{cancelled}/cancel")
    api("POST", f"/v1/jobs/{paused}/pause")
    with session_scope() as session:
        for job_id in jobs:
            session.get_one(Job, job_id).queue = queue
    assert _count(queue) == before + 2
    api("POST", f"/v1/jobs/{waiting}/cancel")
    assert _count(queue) == before + 1
