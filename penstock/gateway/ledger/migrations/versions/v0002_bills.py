"""Bills that come after their rows, device time of failed attempts, and the hours that pools are paid for."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "ledger", sa.Column("lost_device_seconds", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("ledger", sa.Column("pool", sa.Text(), server_default="", nullable=False))
    op.add_column("ledger", sa.Column("owed", sa.JSON(none_as_null=True), nullable=True))
    op.create_index("ix_ledger_pool_at", "ledger", ["pool", "at"], unique=False)
    op.create_index(
        "ix_ledger_owed_at",
        "ledger",
        ["at"],
        unique=False,
        sqlite_where=sa.text("owed IS NOT NULL"),
        postgresql_where=sa.text("owed IS NOT NULL"),
    )
    op.create_table(
        "paid",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("begin", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.Text(), server_default="", nullable=False),
        sa.Column("devices", sa.Integer(), server_default="0", nullable=False),
        sa.Column("taken", sa.Integer(), server_default="0", nullable=False),
        sa.Column("price_per_hour", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("pool", "worker", "begin", name="pk_paid"),
    )
    op.create_index("ix_paid_pool_until", "paid", ["pool", "until"], unique=False)


def downgrade() -> None:
    op.drop_table("paid")
    op.drop_index("ix_ledger_owed_at", "ledger")
    op.drop_index("ix_ledger_pool_at", "ledger")
    for name in ("owed", "pool", "lost_device_seconds"):
        op.drop_column("ledger", name)
