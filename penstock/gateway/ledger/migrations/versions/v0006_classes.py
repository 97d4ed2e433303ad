"""The class of a key's requests."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("keys", sa.Column("service_class", sa.Text(), server_default="realtime", nullable=False))


def downgrade() -> None:
    op.drop_column("keys", "service_class")
