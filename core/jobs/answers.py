"""What a teacher's API has answered: each request of a tenant is paid for once."""

from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.jobs.models import TeacherAnswer, TeacherRequest


class Spent(NamedTuple):
    """What a job has paid for."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


def find_answer(session: Session, tenant_id: str, key: str) -> dict[str, Any] | None:
    """Returns the answer to a request, or None."""
    row = session.get(TeacherAnswer, (tenant_id, key))
    return row.answer if row else None


def take_request(session: Session, tenant_id: str, job_id: str, key: str, seconds: float) -> bool:
    """Returns whether a job may send a request that has no answer; for so many seconds no other job may then.

    The job itself may at any time: of its workers one alone is not given up.
    """
    until = func.now() + timedelta(seconds=seconds)
    row = {"tenant_id": tenant_id, "key": key, "job_id": job_id, "asked_until": until}
    is_free = or_(TeacherRequest.job_id == job_id, TeacherRequest.asked_until < func.now())
    changes = {"job_id": job_id, "asked_until": until}
    statement = (
        insert(TeacherRequest)
        .values(row)
        .on_conflict_do_update(index_elements=["tenant_id", "key"], set_=changes, where=is_free)
    )
    return session.scalar(statement.returning(TeacherRequest.key)) is not None


def release_request(session: Session, tenant_id: str, job_id: str, key: str) -> None:
    """Lets others send a request of a job that is answered, or will not be."""
    mine = (TeacherRequest.tenant_id == tenant_id, TeacherRequest.key == key, TeacherRequest.job_id == job_id)
    session.execute(delete(TeacherRequest).where(*mine))


def keep_answer(session: Session, tenant_id: str, job_id: str, key: str, answer: dict[str, Any], spent: Spent) -> None:
    """Keeps an answer; the first one to a request stays."""
    row = {"tenant_id": tenant_id, "key": key, "job_id": job_id, "answer": answer}
    tokens = {"prompt_tokens": spent.prompt_tokens, "completion_tokens": spent.completion_tokens}
    session.execute(insert(TeacherAnswer).values(row | tokens).on_conflict_do_nothing())
    release_request(session, tenant_id, job_id, key)


def sum_spent(session: Session, tenant_id: str, job_id: str) -> Spent:
    """Returns what a job has paid for so far."""
    columns = [
        func.coalesce(func.sum(getattr(TeacherAnswer, f"{kind}_tokens")), 0) for kind in ("prompt", "completion")
    ]
    query = select(func.count(), *columns).where(TeacherAnswer.tenant_id == tenant_id, TeacherAnswer.job_id == job_id)
    requests, prompt_tokens, completion_tokens = session.execute(query).one()
    return Spent(int(requests), int(prompt_tokens), int(completion_tokens))
