"""Ledger, accounts, leases, workers, keys.

Revisions are frozen: what one has done to a database must not change with schema.py. So columns stand here a
second time, and a test compares what all revisions together make with schema.py.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("window", sa.Text(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("used", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("team", sa.Text(), server_default="", nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("routes", sa.JSON(), nullable=True),
        sa.Column("limits", sa.JSON(), nullable=True),
        sa.Column("local_only", sa.Boolean(), server_default="0", nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("old_digest", sa.LargeBinary(), nullable=True),
        sa.Column("old_until", sa.BigInteger(), nullable=True),
        sa.Column("hint", sa.Text(), server_default="", nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("expires", sa.BigInteger(), nullable=True),
        sa.Column("revoked", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("digest", name="uq_keys_digest"),
        sa.UniqueConstraint("old_digest", name="uq_keys_old_digest"),
    )
    op.create_table(
        "ledger",
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.Text(), server_default="", nullable=False),
        sa.Column("key_name", sa.Text(), server_default="", nullable=False),
        sa.Column("team", sa.Text(), server_default="", nullable=False),
        sa.Column("feature", sa.Text(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("endpoint", sa.Text(), server_default="", nullable=False),
        sa.Column("route", sa.Text(), server_default="", nullable=False),
        sa.Column("upstream", sa.Text(), server_default="", nullable=False),
        sa.Column("replica", sa.Text(), server_default="", nullable=False),
        sa.Column("model", sa.Text(), server_default="", nullable=False),
        sa.Column("status", sa.Integer(), server_default="0", nullable=False),
        sa.Column("end", sa.Text(), server_default="", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("device_seconds", sa.BigInteger(), nullable=True),
        sa.Column("device_seconds_estimated", sa.Boolean(), server_default="0", nullable=False),
        sa.Column("device", sa.Text(), server_default="", nullable=False),
        sa.Column("dollars", sa.BigInteger(), nullable=True),
        sa.Column("comparator_dollars", sa.BigInteger(), nullable=True),
        sa.Column("waited", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("first_byte", sa.BigInteger(), nullable=True),
        sa.Column("total", sa.BigInteger(), nullable=True),
        sa.Column("settlement", sa.Text(), server_default="", nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reserved_dollars", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reserved_device_seconds", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("escalated_from", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("charged", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("worker", "number", name="pk_ledger"),
    )
    op.create_index("ix_ledger_at", "ledger", ["at"], unique=False)
    op.create_index("ix_ledger_feature_at", "ledger", ["feature", "at"], unique=False)
    op.create_index("ix_ledger_id", "ledger", ["id"], unique=False)
    op.create_index("ix_ledger_key_id_at", "ledger", ["key_id", "at"], unique=False)
    op.create_index("ix_ledger_route_at", "ledger", ["route", "at"], unique=False)
    op.create_index("ix_ledger_team_at", "ledger", ["team", "at"], unique=False)
    op.create_table(
        "meta",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_meta"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), server_default="", nullable=False),
        sa.Column("seen", sa.Float(), nullable=False),
        sa.Column("gone", sa.Float(), nullable=True),
        sa.Column("segment", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("offset", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("done", sa.Boolean(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_table(
        "leases",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("granted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("wanted_since", sa.Float(), nullable=True),
        sa.Column("touched", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.id"], name="fk_leases_account"),
        sa.ForeignKeyConstraint(["worker"], ["workers.id"], name="fk_leases_worker"),
        sa.PrimaryKeyConstraint("account", "worker", name="pk_leases"),
    )
    op.create_index(
        "ix_leases_wanted_since",
        "leases",
        ["wanted_since"],
        unique=False,
        sqlite_where=sa.text("wanted_since IS NOT NULL"),
        postgresql_where=sa.text("wanted_since IS NOT NULL"),
    )
    op.create_index("ix_leases_worker", "leases", ["worker"], unique=False)


def downgrade() -> None:
    for table in ("leases", "workers", "meta", "ledger", "keys", "accounts"):
        op.drop_table(table)
