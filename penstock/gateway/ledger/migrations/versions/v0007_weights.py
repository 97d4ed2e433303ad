"""Weights of routes that are not the spec's; attempts that failed."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("ledger", sa.Column("failed", sa.JSON(none_as_null=True)))
    op.create_table(
        "weights",
        sa.Column("route", sa.Text(), primary_key=True),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.Column("instead", sa.JSON(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
    )


def downgrade() -> None:
    op.drop_table("weights")
    op.drop_column("ledger", "failed")
