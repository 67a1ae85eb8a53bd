"""Commits in the database. Every function takes the tenant."""

from sqlalchemy import Select, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.models.models import Manifest
from core.repos.models import Commit

MODELS, DATASETS = "models", "datasets"  # kinds


def lock_name(session: Session, tenant_id: str, kind: str, name: str) -> None:
    """Has whoever else commits to that name wait until this transaction ends."""
    key = func.hashtextextended(f"{tenant_id}/{kind}/{name}", 0)
    session.execute(select(func.pg_advisory_xact_lock(key)))


def add_commit(session: Session, tenant_id: str, kind: str, name: str, oid: str, manifest: Manifest) -> None:
    """Makes these files what that name holds now."""
    now = func.clock_timestamp()  # one transaction may make two commits
    values = {"tenant_id": tenant_id, "kind": kind, "name": name, "oid": oid, "manifest_id": manifest.id}
    session.execute(
        insert(Commit)
        .values(values | {"committed_at": now})
        .on_conflict_do_update(index_elements=["tenant_id", "kind", "name", "oid"], set_={"committed_at": now})
    )


def find_newest(session: Session, tenant_id: str, kind: str, name: str) -> tuple[Commit, Manifest] | None:
    """Returns the newest commit of that name with its files, or None."""
    query = _commits(tenant_id, kind, name).order_by(Commit.committed_at.desc()).limit(1)
    row = session.execute(query).one_or_none()
    return None if row is None else (row.Commit, row.Manifest)


def find_commit(session: Session, tenant_id: str, kind: str, name: str, oid: str) -> Manifest | None:
    """Returns the files of a commit of that name, or None."""
    row = session.execute(_commits(tenant_id, kind, name).where(Commit.oid == oid)).one_or_none()
    return None if row is None else row.Manifest


def list_commits(session: Session, tenant_id: str, kind: str, name: str, first: str, limit: int) -> list[Commit]:
    """Returns a commit of that name and those before it, newest first."""
    of_name = (Commit.tenant_id == tenant_id, Commit.kind == kind, Commit.name == name)
    newest_at = select(Commit.committed_at).where(*of_name, Commit.oid == first).scalar_subquery()
    query = select(Commit).where(*of_name, Commit.committed_at <= newest_at)
    return list(session.scalars(query.order_by(Commit.committed_at.desc()).limit(limit)))


def _commits(tenant_id: str, kind: str, name: str) -> Select[Commit, Manifest]:
    query = select(Commit, Manifest).join(Manifest, Manifest.id == Commit.manifest_id)
    return query.where(Commit.tenant_id == tenant_id, Commit.kind == kind, Commit.name == name)


def delete_commits(session: Session, tenant_id: str, kind: str, name: str) -> int:
    """Forgets all commits of that name, and returns how many there were."""
    wanted = (Commit.tenant_id == tenant_id, Commit.kind == kind, Commit.name == name)
    return session.connection().execute(delete(Commit).where(*wanted)).rowcount
