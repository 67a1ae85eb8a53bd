"""Deletes what nothing refers to: rows first, then the bytes that only they named."""

import logging
import time
from contextlib import closing, suppress
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

from sqlalchemy import and_, delete, exists, func, or_, select, text, tuple_
from sqlalchemy.orm import Session

from core import db
from core.jobs.models import Checkpoint, Job, TeacherAnswer, TeacherRequest
from core.jobs.state import TERMINAL
from core.openai.models import File
from core.settings import get_settings
from core.storage import ArtifactStore, get_store
from core.tenants.models import Tenant
from core.upkeep.lock import deleting
from core.upkeep.references import MANIFESTS, stream_blobs, without
from core.webhooks.models import Delivery
from core.webhooks.sending import KEPT

MAX_ROWS = 1_000  # the rest, of these and of the blobs, is for the next round
MAX_BLOBS = 100_000
MAX_SHARE = 0.05  # of the time; a round that took long makes the next one wait
UPLOAD_FACTOR = 24  # an upload's first file lies finished in `tmp` until its last one has arrived
log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """What a round of collection deleted."""

    num_checkpoints: int
    num_manifests: int
    num_blobs: int
    num_bytes: int
    num_temp_files: int


def collect_when_due() -> Collected | None:
    """Does a round if the last one on this storage, by whichever process, is long enough ago."""
    store, settings = get_store(), get_settings()
    started = time.monotonic()
    with suppress(ValueError):
        note = store.find_note("collected")
        if note and note.age_s < max(settings.collect_every_s, float(note.text) / MAX_SHARE):
            return None
    collected = collect()
    if collected is not None:
        log.info("collected in %.1f s: %s", time.monotonic() - started, collected)
        store.write_note("collected", f"{time.monotonic() - started:.3f}\n")
    return collected


def collect() -> Collected | None:
    """Does one round and returns what it deleted; None while someone else deletes, or needs all bytes to stay.

    Safe at any moment and in any number: what goes is older than `collect_after_s`, and `core.upkeep.references` says
    why nobody can come to want it.
    """
    store, age_s = get_store(), get_settings().collect_after_s
    with deleting() as allowed:
        if not allowed or not owns(store):
            return None
        before = store.now() - age_s
        with db.session_scope() as session:
            num_checkpoints = drop_checkpoints(session)
        with db.session_scope() as session:
            drop_answers(session)
            drop_files(session)
            drop_deliveries(session)
        with db.session_scope() as session:
            num_manifests = drop_manifests(session)
        store.tidy(before)
        sizes = [size for sha256 in list_dead(store, before) if (size := store.discard(sha256, before)) is not None]
        num_temp_files = store.sweep_temp(UPLOAD_FACTOR * age_s)
    return Collected(num_checkpoints, num_manifests, len(sizes), sum(sizes), num_temp_files)


def owns(store: ArtifactStore) -> bool:
    """Tells whether this storage belongs to this database, which the first round on either settles.

    A database is known by its first tenant, also after it was restored elsewhere. So a worker with the wrong address of
    either, or a second set-up on the same folder, doesn't take all bytes for dead.
    """
    with db.session_scope() as session:
        tenant_id = session.scalar(select(func.min(Tenant.id)))
    if tenant_id is None:
        return False
    note = store.find_note("database")
    if note is None:
        store.write_note("database", f"{tenant_id}\n")
    owner = note.text.strip() if note else tenant_id
    if owner != tenant_id:
        log.error("%s belongs to the database of %s, not to this one; nothing is collected", store, owner)
    return bool(owner == tenant_id)


def drop_checkpoints(session: Session) -> int:
    """Forgets the checkpoints of deleted jobs and of those that ended long ago; returns how many.

    A job that somebody holds, as to copy its checkpoints, is left for the next round.
    """
    oldest = func.now() - timedelta(seconds=get_settings().keep_checkpoints_s)
    is_over = or_(Job.deleted_at.is_not(None), and_(Job.state.in_(TERMINAL), Job.finished_at < oldest))
    job_ids = session.scalars(
        select(Job.id)
        .where(is_over, exists().where(Checkpoint.job_id == Job.id))
        .limit(MAX_ROWS)
        .with_for_update(skip_locked=True)
    ).all()
    return session.connection().execute(delete(Checkpoint).where(Checkpoint.job_id.in_(job_ids))).rowcount


def drop_answers(session: Session) -> None:
    """Forgets what teachers' APIs have answered long ago, and who asked them and died."""
    oldest = func.now() - timedelta(seconds=get_settings().keep_answers_s)
    some = select(TeacherAnswer.tenant_id, TeacherAnswer.key).where(TeacherAnswer.created_at < oldest).limit(MAX_ROWS)
    session.execute(delete(TeacherAnswer).where(tuple_(TeacherAnswer.tenant_id, TeacherAnswer.key).in_(some)))
    session.execute(delete(TeacherRequest).where(TeacherRequest.asked_until < func.now() - timedelta(days=1)))


def drop_files(session: Session) -> None:
    """Forgets files whose time is over, and what has come of them."""
    some = select(File.id).where(File.expires_at < func.now()).limit(MAX_ROWS)
    session.execute(delete(File).where(File.id.in_(some)))


def drop_deliveries(session: Session) -> None:
    """Forgets what was sent to webhooks long ago."""
    oldest = func.now() - KEPT
    some = select(Delivery.id).where(Delivery.created_at < oldest, Delivery.state != "due").limit(MAX_ROWS)
    session.execute(delete(Delivery).where(Delivery.id.in_(some)))


def drop_manifests(session: Session) -> int:
    """Deletes the old manifests that nothing refers to and returns how many.

    `put_manifest` sets `created_at` anew, in the transaction that then refers to the manifest. If that comes first,
    the row is locked or young; if this comes first, `put_manifest` waits for its end and makes a new row.
    """
    statement = text(
        f"""
        delete from manifests where id in (
            select id from manifests
             where created_at < now() - cast(:age as interval)
               and id in (select id from manifests except select manifest_id from ({MANIFESTS}) as roots)
               for update skip locked)
        """
    )
    age = timedelta(seconds=get_settings().collect_after_s)
    return session.connection().execute(statement, {"age": age}).rowcount


def list_dead(store: ArtifactStore, before: float) -> list[str]:
    """Returns blobs older than `before` that no row refers to; they are deleted once no transaction is open here."""
    engine = db.get_engine().execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, closing(stream_blobs(connection)) as blobs:
        unreferenced = without(store.list_blobs(), blobs)
        return list(islice((sha256 for sha256 in unreferenced if store.is_older(sha256, before)), MAX_BLOBS))
