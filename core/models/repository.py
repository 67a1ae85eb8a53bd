"""Manifests and models in the database. Every function takes the tenant."""

from collections.abc import Iterable

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.errors import Conflict, NotFound
from core.ids import new_id
from core.jobs.repository import find_unfinished_user
from core.models.facts import ModelFacts
from core.models.models import Manifest, Model
from core.repos.repository import MODELS, delete_commits
from core.storage import Blob, ManifestFile, manifest_digest

FIND = select(Model).where(  # every job asks this, so it is put together once
    Model.tenant_id == bindparam("tenant_id"), or_(Model.name == bindparam("ref"), Model.id == bindparam("ref"))
)


def put_manifest(session: Session, tenant_id: str, files: Iterable[ManifestFile]) -> Manifest:
    """Returns the tenant's manifest of these files, made if it did not exist.

    One that existed is as young as this transaction, so that the collection keeps it until a row refers to it.
    """
    rows = sorted((file.model_dump() for file in files), key=lambda row: row["path"])
    digest = manifest_digest(ManifestFile(**row) for row in rows)
    values = {"tenant_id": tenant_id, "sha256": digest, "size_bytes": sum(row["size_bytes"] for row in rows)}
    return session.scalars(
        insert(Manifest)
        .values(id=new_id("man"), files=rows, **values)
        .on_conflict_do_update(index_elements=["tenant_id", "sha256"], set_={"created_at": func.now()})
        .returning(Manifest),
        execution_options={"populate_existing": True},
    ).one()


def get_manifest(session: Session, tenant_id: str, manifest_id: str) -> Manifest:
    """Returns a manifest of the tenant. Raises NotFound."""
    manifest = session.scalar(select(Manifest).where(Manifest.tenant_id == tenant_id, Manifest.id == manifest_id))
    if manifest is None:
        raise NotFound(f"There is no manifest '{manifest_id}' in your tenant.")
    return manifest


def list_manifests(session: Session, tenant_id: str, manifest_ids: Iterable[str]) -> dict[str, Manifest]:
    """Returns those of these manifests that are the tenant's, by id."""
    query = select(Manifest).where(Manifest.tenant_id == tenant_id, Manifest.id.in_(manifest_ids))
    return {manifest.id: manifest for manifest in session.scalars(query)}


def keep_uploaded(session: Session, tenant_id: str, blob: Blob) -> None:
    """Notes that the tenant has sent these bytes, as a manifest, so that the collection leaves them for a while."""
    put_manifest(session, tenant_id, [_alone(blob)])


def find_uploaded(session: Session, tenant_id: str, blobs: Iterable[Blob]) -> set[Blob]:
    """Returns those of the bytes that the tenant has sent, and makes them as young as this transaction."""
    by_digest = {manifest_digest([_alone(blob)]): blob for blob in blobs}
    wanted = (Manifest.tenant_id == tenant_id, Manifest.sha256.in_(by_digest))
    touched = update(Manifest).where(*wanted).values(created_at=func.now()).returning(Manifest.sha256)
    return {by_digest[digest] for digest in session.scalars(touched)}


def _alone(blob: Blob) -> ManifestFile:
    return ManifestFile(path="uploaded", sha256=blob.sha256, size_bytes=blob.size_bytes)


def files_of(manifest: Manifest, folder: str = "") -> list[ManifestFile]:
    """Returns the manifest's files, or those in one of its folders by their paths there."""
    start = f"{folder}/" if folder else ""
    rows = [row for row in manifest.files if row["path"].startswith(start)]
    return [ManifestFile(**row | {"path": row["path"].removeprefix(start)}) for row in rows]


def refuse_taken(session: Session, tenant_id: str, name: str) -> None:
    """Raises Conflict when the tenant has a model of that name."""
    if session.scalar(select(Model.id).where(Model.tenant_id == tenant_id, Model.name == name)):
        raise _taken(name)


def _taken(name: str) -> Conflict:
    return Conflict(f"You have a model '{name}' already; choose another name, or delete it first.", param="name")


def create_model(
    session: Session, tenant_id: str, name: str, files: Iterable[ManifestFile], facts: ModelFacts
) -> Model:
    """Returns the new model. Raises Conflict when the name is taken."""
    manifest = put_manifest(session, tenant_id, files)
    values = {"tenant_id": tenant_id, "name": name, "manifest_id": manifest.id, "facts": facts.model_dump()}
    model_id = session.scalar(
        insert(Model)
        .values(id=new_id("mdl"), **values)
        .on_conflict_do_nothing(index_elements=["tenant_id", "name"])
        .returning(Model.id)
    )
    if model_id is None:
        raise _taken(name)
    return session.get_one(Model, model_id)


def set_model(session: Session, tenant_id: str, name: str, manifest: Manifest, facts: ModelFacts) -> None:
    """Makes these files the model of that name, whether there was one or not."""
    values = {"manifest_id": manifest.id, "facts": facts.model_dump()}
    session.execute(
        insert(Model)
        .values(id=new_id("mdl"), tenant_id=tenant_id, name=name, **values)
        .on_conflict_do_update(index_elements=["tenant_id", "name"], set_=values)
    )


def find_model(session: Session, tenant_id: str, ref: str, *, lock: bool = False) -> Model | None:
    """Returns the tenant's model of that name or id, or None."""
    rows = session.scalars(FIND.with_for_update() if lock else FIND, {"tenant_id": tenant_id, "ref": ref}).all()
    return next((row for row in rows if row.name == ref), rows[0] if rows else None)


def get_model(session: Session, tenant_id: str, ref: str, *, lock: bool = False) -> Model:
    """Returns the tenant's model of that name or id. Raises NotFound."""
    model = find_model(session, tenant_id, ref, lock=lock)
    if model is None:
        raise NotFound(f"There is no model '{ref}' in your tenant.")
    return model


def list_model_names(session: Session, tenant_id: str) -> list[str]:
    """Returns the names of the tenant's models, for suggestions."""
    return list(session.scalars(select(Model.name).where(Model.tenant_id == tenant_id).order_by(Model.name).limit(200)))


def list_models(session: Session, tenant_id: str, *, after: str | None, limit: int) -> list[tuple[Model, Manifest]]:
    """Returns the tenant's models with their manifests, newest first, from the id `after` (exclusive)."""
    query = select(Model, Manifest).join(Manifest, Manifest.id == Model.manifest_id).where(Model.tenant_id == tenant_id)
    if after:
        query = query.where(Model.id < after)
    return [(row.Model, row.Manifest) for row in session.execute(query.order_by(Model.id.desc()).limit(limit))]


def delete_model(session: Session, tenant_id: str, ref: str) -> None:
    """Deletes a model and its commits. Raises NotFound, or Conflict while a job that has not ended uses it."""
    model = get_model(session, tenant_id, ref, lock=True)
    job_id = find_unfinished_user(session, tenant_id, "$.*.model_id", model.id)
    if job_id:
        raise Conflict(f"The job '{job_id}' uses this model and has not ended; wait for it or cancel it first.")
    delete_commits(session, tenant_id, MODELS, model.name)
    session.delete(model)
