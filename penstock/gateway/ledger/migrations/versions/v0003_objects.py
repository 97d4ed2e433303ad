"""Files and batches that upstreams keep."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "objects",
        sa.Column("replica", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), server_default="", nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("expires", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), server_default="", nullable=False),
        sa.Column("checked", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("about", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("replica", "id", name="pk_objects"),
    )
    op.create_index("ix_objects_key_id_kind_created", "objects", ["key_id", "kind", "created"], unique=False)
    running = sa.text("state IN ('asked', 'running')")
    op.create_index(
        "ix_objects_checked",
        "objects",
        ["checked"],
        unique=False,
        sqlite_where=running,
        postgresql_where=running,
    )


def downgrade() -> None:
    op.drop_table("objects")
