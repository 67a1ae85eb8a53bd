"""checkpoints, the stage cache, usage, and jobs that continue others."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSONB = postgresql.JSONB(astext_type=sa.Text())
NOW = sa.text("now()")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("claimed_at", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("not_before", sa.DateTime(timezone=True), server_default=NOW, nullable=False))
    op.add_column("jobs", sa.Column("retries", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("parent_id", sa.Text()))
    op.add_column("jobs", sa.Column("content_sha256", sa.Text()))
    op.add_column("jobs", sa.Column("envelope_sha256", sa.Text()))
    op.create_index("ix_jobs_parent_id", "jobs", ["parent_id"], postgresql_where=sa.text("parent_id is not null"))
    op.add_column("stages", sa.Column("cache_key", sa.Text()))
    op.add_column("stages", sa.Column("outputs", JSONB, server_default="{}", nullable=False))
    op.add_column("stages", sa.Column("reused", JSONB))
    op.create_index(
        "ix_stages_cache",
        "stages",
        ["tenant_id", "cache_key", "finished_at"],
        postgresql_where=sa.text("cache_key is not null"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("stage_key", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id_jobs"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_checkpoints_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("job_id", "ordinal", "step", name=op.f("pk_checkpoints")),
    )
    op.create_index(op.f("ix_checkpoints_sha256"), "checkpoints", ["sha256"])
    op.create_table(
        "usage",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("window_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_usage_job_id_jobs"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_usage_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("job_id", "fence", "window_start", name=op.f("pk_usage")),
    )


def downgrade() -> None:
    op.drop_table("usage")
    op.drop_table("checkpoints")
    op.drop_index("ix_stages_cache", table_name="stages")
    for column in ("reused", "outputs", "cache_key"):
        op.drop_column("stages", column)
    op.drop_index("ix_jobs_parent_id", table_name="jobs")
    for column in ("envelope_sha256", "content_sha256", "parent_id", "retries", "not_before", "claimed_at"):
        op.drop_column("jobs", column)
