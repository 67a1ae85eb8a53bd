"""indexes for lists and queues of any length, and a job's metadata as rows that one can serve."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SHOWN = sa.text("deleted_at is null")
INDEXES = {
    "ix_jobs_shown": (["tenant_id", "id"], SHOWN),
    "ix_jobs_state": (["tenant_id", "state", "id"], SHOWN),
    "ix_jobs_name": (["tenant_id", "name", "id"], SHOWN),
    "ix_jobs_oldest_queued": (["id"], sa.text("state = 'queued'")),
}


def upgrade() -> None:
    op.create_table(
        "job_labels",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_labels_job_id_jobs"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_job_labels_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "key", "value", "job_id", name=op.f("pk_job_labels")),
        if_not_exists=True,
    )
    op.create_index(op.f("ix_job_labels_job_id"), "job_labels", ["job_id"], if_not_exists=True)
    with op.get_context().autocommit_block():  # so that jobs can be written meanwhile; all of it can be done again
        op.execute(
            "insert into job_labels (tenant_id, key, value, job_id) "
            "select tenant_id, key, value, id from jobs cross join lateral jsonb_each_text(labels) "
            "on conflict do nothing"
        )
        for name, (columns, where) in INDEXES.items():
            op.drop_index(name, table_name="jobs", postgresql_concurrently=True, if_exists=True)  # one left half made
            op.create_index(name, "jobs", columns, postgresql_where=where, postgresql_concurrently=True)
        for name in ("ix_jobs_metadata", "ix_jobs_tenant_id_id"):
            op.drop_index(name, table_name="jobs", postgresql_concurrently=True, if_exists=True)


def downgrade() -> None:
    op.create_index("ix_jobs_tenant_id_id", "jobs", ["tenant_id", "id"])
    op.create_index("ix_jobs_metadata", "jobs", ["labels"], postgresql_using="gin")
    for name in INDEXES:
        op.drop_index(name, table_name="jobs")
    op.drop_table("job_labels")
