"""Commits."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from core.db import Base
from core.models.models import Manifest
from core.tenants.models import Tenant


class Commit(Base):
    """All files of a model or data set as of a commit; the newest one of a name is what it holds now.

    There is a model or data set of that name once its files are all there. A commit of equal files is the same row,
    with a new time.
    """

    __tablename__ = "commits"
    __table_args__ = (Index("ix_commits_newest", "tenant_id", "kind", "name", "committed_at"),)

    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    oid: Mapped[str] = mapped_column(primary_key=True)
    manifest_id: Mapped[str] = mapped_column(ForeignKey(Manifest.id), index=True)
    committed_at: Mapped[datetime] = mapped_column(server_default=func.now())
