"""Data sets in the database. Every function takes the tenant; another tenant's data set does not exist."""

from typing import Any

from sqlalchemy import bindparam, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.datasets.models import Dataset
from core.errors import Conflict, NotFound
from core.ids import new_id
from core.jobs.repository import find_unfinished_user
from core.repos.repository import DATASETS, delete_commits

FIND = select(Dataset).where(  # every job asks this, so it is put together once
    Dataset.tenant_id == bindparam("tenant_id"), or_(Dataset.name == bindparam("ref"), Dataset.id == bindparam("ref"))
)


def refuse_taken(session: Session, tenant_id: str, name: str) -> None:
    """Raises Conflict when the tenant has a data set of that name."""
    if session.scalar(select(Dataset.id).where(Dataset.tenant_id == tenant_id, Dataset.name == name)):
        raise _taken(name)


def _taken(name: str) -> Conflict:
    return Conflict(f"You have a data set '{name}' already; choose another name, or delete it first.", param="name")


def create_dataset(
    session: Session, tenant_id: str, name: str, splits: dict[str, Any], report: dict[str, Any]
) -> Dataset:
    """Returns the new data set. Raises Conflict when the name is taken."""
    dataset_id = session.scalar(
        insert(Dataset)
        .values(id=new_id("ds"), tenant_id=tenant_id, name=name, splits=splits, report=report)
        .on_conflict_do_nothing(index_elements=["tenant_id", "name"])
        .returning(Dataset.id)
    )
    if dataset_id is None:
        raise _taken(name)
    return session.get_one(Dataset, dataset_id)


def set_dataset(session: Session, tenant_id: str, name: str, splits: dict[str, Any], report: dict[str, Any]) -> None:
    """Makes these splits the data set of that name, whether there was one or not."""
    values = {"splits": splits, "report": report}
    session.execute(
        insert(Dataset)
        .values(id=new_id("ds"), tenant_id=tenant_id, name=name, **values)
        .on_conflict_do_update(index_elements=["tenant_id", "name"], set_=values)
    )


def find_dataset(session: Session, tenant_id: str, ref: str, *, lock: bool = False) -> Dataset | None:
    """Returns the tenant's data set of that name or id, or None."""
    rows = session.scalars(FIND.with_for_update() if lock else FIND, {"tenant_id": tenant_id, "ref": ref}).all()
    return next((row for row in rows if row.name == ref), rows[0] if rows else None)


def get_dataset(session: Session, tenant_id: str, ref: str, *, lock: bool = False) -> Dataset:
    """Returns the tenant's data set of that name or id. Raises NotFound."""
    dataset = find_dataset(session, tenant_id, ref, lock=lock)
    if dataset is None:
        raise NotFound(f"There is no data set '{ref}' in your tenant.")
    return dataset


def list_dataset_names(session: Session, tenant_id: str) -> list[str]:
    """Returns the names of the tenant's data sets, for suggestions."""
    return list(
        session.scalars(select(Dataset.name).where(Dataset.tenant_id == tenant_id).order_by(Dataset.name).limit(200))
    )


def list_datasets(session: Session, tenant_id: str, *, after: str | None, limit: int) -> list[Dataset]:
    """Returns the tenant's data sets, newest first, from the id `after` (exclusive)."""
    query = select(Dataset).where(Dataset.tenant_id == tenant_id)
    if after:
        query = query.where(Dataset.id < after)
    return list(session.scalars(query.order_by(Dataset.id.desc()).limit(limit)))


def delete_dataset(session: Session, tenant_id: str, ref: str) -> None:
    """Deletes a data set and its commits. Raises NotFound, or Conflict while a job that has not ended uses it."""
    dataset = get_dataset(session, tenant_id, ref, lock=True)
    job_id = find_unfinished_user(session, tenant_id, "$.data.*.dataset_id", dataset.id)
    if job_id:
        raise Conflict(f"The job '{job_id}' uses this data set and has not ended; wait for it or cancel it first.")
    delete_commits(session, tenant_id, DATASETS, dataset.name)
    session.delete(dataset)
