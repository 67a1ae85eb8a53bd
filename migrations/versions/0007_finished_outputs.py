"""outputs that are finished before their stage is, in checkpoints."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.Column("finished", postgresql.JSONB(astext_type=sa.Text()), server_default="[]", nullable=False)
    op.add_column("checkpoints", column)


def downgrade() -> None:
    op.drop_column("checkpoints", "finished")
