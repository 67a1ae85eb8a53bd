"""Compares rows with what should be true, and mends the difference.

Every action is safe to repeat; many reconcilers at once are harmless.
"""

import logging
from datetime import timedelta

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from core.db import session_scope
from core.jobs.models import IdempotencyKey, Job
from core.jobs.ownership import give_back
from core.jobs.state import OWNED
from core.queue import hint
from core.settings import get_settings
from worker.staging import list_folders, sweep

ADVISORY_LOCK = 7_571_110_053
MAX_HINTS = 100
log = logging.getLogger(__name__)


def tick() -> bool:
    """Does one round, unless another reconciler is at it; returns whether it did."""
    folders = list_folders()
    with session_scope() as session:
        if not session.scalar(select(func.pg_try_advisory_xact_lock(ADVISORY_LOCK))):
            return False
        take_back_expired(session)
        forget_old_keys(session)
        queues = due_hints(session)
        live = set(
            session.scalars(select(Job.id + "-" + func.cast(Job.fence, Job.id.type)).where(Job.state.in_(OWNED)))
        )
    for queue in queues:
        hint(queue)
    sweep(folders, live)
    return True


def take_back_expired(session: Session) -> int:
    """Queues the jobs whose lease ran out, or settles them where their user wants them; returns how many."""
    expired = session.scalars(
        select(Job).where(Job.state.in_(OWNED), Job.lease_until < func.now()).with_for_update(skip_locked=True)
    ).all()
    for job in expired:
        log.warning("lease of %s ran out; its worker was %s", job.id, job.lease_owner)
        give_back(session, job, f"the worker {job.lease_owner} was lost", lost=True)
    return len(expired)


def due_hints(session: Session) -> list[str]:
    """Returns the queue of each queued job that nobody was told of lately, and notes that they now are."""
    stale = func.now() - timedelta(seconds=get_settings().hint_after_s)
    due = (
        select(Job.id)
        .where(
            Job.state == "queued",
            Job.desired == "run",
            Job.not_before <= func.now(),
            or_(Job.hinted_at.is_(None), Job.hinted_at < stale),
        )
        .order_by(Job.id)
        .limit(MAX_HINTS)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    note = update(Job).where(Job.id.in_(select(due.c.id))).values(hinted_at=func.now()).returning(Job.queue)
    return list(session.scalars(note, execution_options={"synchronize_session": False}))


def forget_old_keys(session: Session) -> None:
    """Deletes the idempotency keys whose time is over."""
    oldest = func.now() - timedelta(seconds=get_settings().idempotency_ttl_s)
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < oldest))
