"""commits to models and data sets."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NOW = sa.text("now()")


def upgrade() -> None:
    op.create_table(
        "commits",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("oid", sa.Text(), nullable=False),
        sa.Column("manifest_id", sa.Text(), nullable=False),
        sa.Column("committed_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_commits_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["manifest_id"], ["manifests.id"], name=op.f("fk_commits_manifest_id_manifests")),
        sa.PrimaryKeyConstraint("tenant_id", "kind", "name", "oid", name=op.f("pk_commits")),
    )
    op.create_index(op.f("ix_commits_manifest_id"), "commits", ["manifest_id"])
    op.create_index("ix_commits_newest", "commits", ["tenant_id", "kind", "name", "committed_at"])


def downgrade() -> None:
    op.drop_table("commits")
