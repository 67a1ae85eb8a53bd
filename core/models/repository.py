"""Manifests in the database."""

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.errors import NotFound
from core.ids import new_id
from core.models.models import Manifest
from core.storage import ManifestFile, manifest_digest


def put_manifest(session: Session, tenant_id: str, files: Iterable[ManifestFile]) -> Manifest:
    """Returns the tenant's manifest of these files, made if it did not exist."""
    rows = sorted((file.model_dump() for file in files), key=lambda row: row["path"])
    digest = manifest_digest(ManifestFile(**row) for row in rows)
    session.execute(
        insert(Manifest)
        .values(
            id=new_id("man"),
            tenant_id=tenant_id,
            sha256=digest,
            size_bytes=sum(row["size_bytes"] for row in rows),
            files=rows,
        )
        .on_conflict_do_nothing(index_elements=["tenant_id", "sha256"])
    )
    return session.scalars(select(Manifest).where(Manifest.tenant_id == tenant_id, Manifest.sha256 == digest)).one()


def get_manifest(session: Session, tenant_id: str, manifest_id: str) -> Manifest:
    """Returns a manifest of the tenant. Raises NotFound."""
    manifest = session.scalar(select(Manifest).where(Manifest.tenant_id == tenant_id, Manifest.id == manifest_id))
    if manifest is None:
        raise NotFound(f"There is no manifest '{manifest_id}' in your tenant.")
    return manifest


def files_of(manifest: Manifest) -> list[ManifestFile]:
    """Returns the manifest's files."""
    return [ManifestFile(**row) for row in manifest.files]
