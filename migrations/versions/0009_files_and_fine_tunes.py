"""files, and jobs as OpenAI's clients asked for them."""

from datetime import datetime

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NOW = sa.text("now()")


def _time(name: str, *, nullable: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), server_default=None if nullable else NOW, nullable=nullable)


def _reference(table: str, column: str, to: str, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{to}.id"], name=op.f(f"fk_{table}_{column}_{to}"), ondelete=ondelete)


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest_id", sa.Text(), nullable=True),
        sa.Column("is_cancelled", sa.Boolean(), server_default="false", nullable=False),
        _time("created_at"),
        _time("expires_at", nullable=True),
        _reference("files", "tenant_id", "tenants"),
        _reference("files", "manifest_id", "manifests"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_tenant_id", "files", ["tenant_id", "id"])
    op.create_index(op.f("ix_files_manifest_id"), "files", ["manifest_id"])
    op.create_index(op.f("ix_files_expires_at"), "files", ["expires_at"])
    op.create_table(
        "file_parts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("file_id", sa.Text(), nullable=False),
        sa.Column("manifest_id", sa.Text(), nullable=False),
        _time("created_at"),
        _reference("file_parts", "tenant_id", "tenants"),
        _reference("file_parts", "file_id", "files", ondelete="CASCADE"),
        _reference("file_parts", "manifest_id", "manifests"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file_parts")),
    )
    op.create_index(op.f("ix_file_parts_file_id"), "file_parts", ["file_id"])
    op.create_index(op.f("ix_file_parts_manifest_id"), "file_parts", ["manifest_id"])
    op.create_table(
        "fine_tunes",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(), nullable=False),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        _time("created_at"),
        _reference("fine_tunes", "job_id", "jobs", ondelete="CASCADE"),
        _reference("fine_tunes", "tenant_id", "tenants"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_fine_tunes")),
    )
    op.create_index("ix_fine_tunes_request", "fine_tunes", ["tenant_id", "request_sha256", "created_at"])


def downgrade() -> None:
    op.drop_table("fine_tunes")
    op.drop_table("file_parts")
    op.drop_table("files")
