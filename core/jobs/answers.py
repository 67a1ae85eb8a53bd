"""What a teacher's API has answered: each request of a tenant is paid for once."""

from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.jobs.models import TeacherAnswer


class Spent(NamedTuple):
    """What a job has paid for."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


def find_answer(session: Session, tenant_id: str, key: str) -> dict[str, Any] | None:
    """Returns the answer to a request, or None."""
    row = session.get(TeacherAnswer, (tenant_id, key))
    return row.answer if row else None


def keep_answer(session: Session, tenant_id: str, job_id: str, key: str, answer: dict[str, Any], spent: Spent) -> None:
    """Keeps an answer; the first one to a request stays."""
    row = {"tenant_id": tenant_id, "key": key, "job_id": job_id, "answer": answer}
    tokens = {"prompt_tokens": spent.prompt_tokens, "completion_tokens": spent.completion_tokens}
    session.execute(insert(TeacherAnswer).values(row | tokens).on_conflict_do_nothing())


def sum_spent(session: Session, tenant_id: str, job_id: str) -> Spent:
    """Returns what a job has paid for so far."""
    columns = [
        func.coalesce(func.sum(getattr(TeacherAnswer, f"{kind}_tokens")), 0) for kind in ("prompt", "completion")
    ]
    query = select(func.count(), *columns).where(TeacherAnswer.tenant_id == tenant_id, TeacherAnswer.job_id == job_id)
    requests, prompt_tokens, completion_tokens = session.execute(query).one()
    return Spent(int(requests), int(prompt_tokens), int(completion_tokens))
