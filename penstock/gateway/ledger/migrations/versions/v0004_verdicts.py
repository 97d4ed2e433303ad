"""What verifiers said of an answer, on routes that escalate."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("ledger", sa.Column("verifier", sa.Text(), server_default="", nullable=False))
    op.add_column("ledger", sa.Column("verdict", sa.Text(), server_default="", nullable=False))
    op.add_column("ledger", sa.Column("score", sa.Float(), nullable=True))
    op.add_column("ledger", sa.Column("reason", sa.Text(), server_default="", nullable=False))


def downgrade() -> None:
    for name in ("reason", "score", "verdict", "verifier"):
        op.drop_column("ledger", name)
