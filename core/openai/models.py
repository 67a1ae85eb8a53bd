"""Uploaded files, and jobs as they were asked for."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from core.db import Base
from core.jobs.models import Job
from core.models.models import Manifest
from core.tenants.models import Tenant


class File(Base):
    """A file that jobs may be asked to train on; while its parts are still coming it has no manifest."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_tenant_id", "tenant_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    manifest_id: Mapped[str | None] = mapped_column(ForeignKey(Manifest.id), index=True)
    is_cancelled: Mapped[bool] = mapped_column(server_default="false")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(index=True)


class FilePart(Base):
    """Some bytes of a file that comes in parts."""

    __tablename__ = "file_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    file_id: Mapped[str] = mapped_column(ForeignKey(File.id, ondelete="CASCADE"), index=True)
    manifest_id: Mapped[str] = mapped_column(ForeignKey(Manifest.id), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class FineTune(Base):
    """A job as an OpenAI client asked for it; `request_sha256` is what tells a request that is sent again."""

    __tablename__ = "fine_tunes"
    __table_args__ = (Index("ix_fine_tunes_request", "tenant_id", "request_sha256", "created_at"),)

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id))
    request: Mapped[dict[str, Any]]
    request_sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
