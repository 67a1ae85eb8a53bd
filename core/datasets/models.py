"""Data sets: named splits of JSON Lines rows."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint, func
from sqlalchemy.orm import Mapped, mapped_column

from core.db import Base
from core.tenants.models import Tenant


class Dataset(Base):
    """A named data set. `splits` maps a split to `{sha256, size_bytes, num_rows, columns, label_counts}`.

    Whatever format was uploaded, each split is stored as one blob of JSON Lines.
    """

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey(Tenant.id), index=True)
    name: Mapped[str]
    splits: Mapped[dict[str, Any]]
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
