"""index what refers to manifests, for their deletion."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_artifacts_manifest_id"), "artifacts", ["manifest_id"])
    op.create_index(op.f("ix_models_manifest_id"), "models", ["manifest_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_models_manifest_id"), table_name="models")
    op.drop_index(op.f("ix_artifacts_manifest_id"), table_name="artifacts")
