"""What jobs measured of their models, of many jobs at once."""

from typing import Any

from sqlalchemy import update

from core.db import session_scope
from core.jobs.models import StageRun
from tests.api import Api, run_job

STAGES = [{"kind": "distill"}, {"kind": "evaluate"}]


def measure(api: Api, score: float, **changes: Any) -> str:
    """Returns the id of a job whose last stage has measured this."""
    job_id = api.make_job(stages=STAGES, **changes)
    run_job(job_id)
    summary = {"models": [{"name": "student", "accuracy": score, "size_bytes": 7}], "num_examples": 9}
    with session_scope() as session:
        session.execute(
            update(StageRun).where(StageRun.job_id == job_id, StageRun.ordinal == 1).values(summary=summary)
        )
    return job_id


def test_results_are_those_of_measured_jobs_newest_first(api: Api, other: Api) -> None:
    measure(other, 0.1)
    ids = [measure(api, score, name=name) for score, name in ((0.5, "a"), (0.75, "b"), (1.0, "a"))]
    api.make_job(stages=STAGES)  # has measured nothing yet
    first = api("GET", "/v1/results", params={"limit": 2}).json()
    rest = api("GET", "/v1/results", params={"limit": 2, "after": first["next_cursor"]}).json()
    assert [row["job_id"] for row in first["data"] + rest["data"]] == ids[::-1]
    assert rest["next_cursor"] is None
    assert [row["models"][0]["accuracy"] for row in first["data"]] == [1.0, 0.75]
    assert first["data"][0]["test"] == "tickets/test"
    named = api("GET", "/v1/results", params={"name": "b"}).json()["data"]
    assert [row["job_id"] for row in named] == [ids[1]]


def test_what_is_taken_over_or_deleted_is_not_listed(api: Api) -> None:
    job_id = measure(api, 0.5)
    more = {"from_stage": 2, "overrides": {"stages": [{"kind": "predict", "texts": ["late"]}]}}
    assert api("POST", f"/v1/jobs/{job_id}/fork", json=more).status_code == 202
    assert [row["job_id"] for row in api("GET", "/v1/results").json()["data"]] == [job_id]
    assert api("DELETE", f"/v1/jobs/{job_id}").status_code == 204
    assert api("GET", "/v1/results").json()["data"] == []
