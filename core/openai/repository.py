"""Files and asked-for jobs in the database. Every function takes the tenant."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Select, and_, delete, func, or_, select
from sqlalchemy.orm import Session, aliased

from core.errors import NotFound
from core.ids import new_id
from core.jobs.models import Job, JobLabel
from core.models.models import Manifest
from core.openai.models import File, FilePart, FineTune

IS_THERE = or_(File.expires_at.is_(None), File.expires_at > func.now())


def create_file(
    session: Session,
    tenant_id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    manifest: Manifest | None,
    expires_at: datetime | None,
) -> File:
    """Returns the new file; one without a manifest is to get its bytes in parts."""
    file = File(
        id=new_id("file").replace("_", "-"),
        tenant_id=tenant_id,
        filename=filename,
        purpose=purpose,
        size_bytes=size_bytes,
        manifest_id=manifest.id if manifest else None,
        expires_at=expires_at,
    )
    session.add(file)
    session.flush()
    session.refresh(file)
    return file


def get_file(session: Session, tenant_id: str, file_id: str, *, lock: bool = False, field: str = "id") -> File:
    """Returns a file of the tenant that has not expired. Raises NotFound, about the field that named it."""
    query = select(File).where(File.tenant_id == tenant_id, File.id == file_id, IS_THERE)
    file = session.scalar(query.with_for_update() if lock else query)
    if file is None:
        raise NotFound(f"No such File object: {file_id}", param=field)
    return file


def list_files(
    session: Session, tenant_id: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
) -> list[File]:
    """Returns whole files of the tenant in the order of their making, from the id `after` (exclusive)."""
    query = select(File).where(File.tenant_id == tenant_id, File.manifest_id.is_not(None), IS_THERE)
    if purpose:
        query = query.where(File.purpose == purpose)
    if after:
        query = query.where(File.id < after if newest_first else File.id > after)
    return list(session.scalars(query.order_by(File.id.desc() if newest_first else File.id).limit(limit)))


def add_part(session: Session, file: File, manifest: Manifest) -> FilePart:
    """Returns the new part of a file."""
    part = FilePart(id=new_id("part"), tenant_id=file.tenant_id, file_id=file.id, manifest_id=manifest.id)
    session.add(part)
    session.flush()
    session.refresh(part)
    return part


def list_parts(session: Session, file: File) -> dict[str, Manifest]:
    """Returns the bytes of a file's parts by their ids."""
    query = select(FilePart.id, Manifest).join(Manifest, Manifest.id == FilePart.manifest_id)
    return dict(session.execute(query.where(FilePart.file_id == file.id)).tuples().all())


def end_parts(session: Session, file: File, manifest: Manifest | None) -> None:
    """Makes a file of its parts, which are forgotten; without a manifest it is given up."""
    session.execute(delete(FilePart).where(FilePart.file_id == file.id))
    file.manifest_id = manifest.id if manifest else None
    file.is_cancelled = manifest is None


def find_repeated(session: Session, tenant_id: str, request_sha256: str, within: timedelta) -> FineTune | None:
    """Returns the job that the same request made a moment ago, or None."""
    query = select(FineTune).where(FineTune.tenant_id == tenant_id, FineTune.request_sha256 == request_sha256)
    query = query.where(FineTune.created_at > func.now() - within)
    return session.scalar(query.order_by(FineTune.created_at.desc()).limit(1))


def get_fine_tune(session: Session, tenant_id: str, job_id: str) -> tuple[FineTune, Job]:
    """Returns a job of the tenant as it was asked for, and as it is. Raises NotFound."""
    row = session.execute(_fine_tunes(tenant_id).where(FineTune.job_id == job_id)).one_or_none()
    if row is None:
        shown = f"ftjob-{job_id.removeprefix('job_')}"
        raise NotFound(f"Could not find fine tune: {shown}", param="fine_tune_id")
    return row.FineTune, row.Job


def list_fine_tunes(
    session: Session,
    tenant_id: str,
    *,
    after: str | None,
    limit: int,
    metadata: Sequence[tuple[str, str]] | None = (),
) -> list[tuple[FineTune, Job]]:
    """Returns such jobs, newest first, from the job `after` (exclusive); with metadata None those that have none."""
    query = _fine_tunes(tenant_id)
    if after:
        query = query.where(Job.id < after)
    if metadata is None:
        query = query.where(~select(JobLabel.job_id).where(JobLabel.job_id == Job.id).exists())
    for key, value in metadata or ():
        label = aliased(JobLabel)
        wanted = and_(label.job_id == Job.id, label.tenant_id == tenant_id, label.key == key, label.value == value)
        query = query.join(label, wanted)
    return [(row.FineTune, row.Job) for row in session.execute(query.order_by(Job.id.desc()).limit(limit))]


def _fine_tunes(tenant_id: str) -> Select[FineTune, Job]:
    query = select(FineTune, Job).join(Job, Job.id == FineTune.job_id)
    return query.where(FineTune.tenant_id == tenant_id, Job.deleted_at.is_(None))
