"""What clouds took for attempts in vain, answers that no verifier has passed, and sums of thirty days.

Rows of before have no such losses; which of their answers were given unverified, they say. Attempts in vain
are counted no more among the requests that have a comparator.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_HOUR = 3600 * 10**9
_DIMENSIONS = ("key_id", "key_name", "team", "feature", "route", "upstream", "model", "pool", "context")
_AMOUNTS = ("lost_dollars", "lost_estimated_dollars")
_MEASURES = (
    "requests", "failed", "unsettled", "input_tokens", "output_tokens", "cached_tokens", "dollars",
    "unsettled_dollars", "unpriced", "device_seconds", "unsettled_device_seconds", "lost_device_seconds",
    "compared", "compared_dollars", "compared_device_seconds", "comparator_dollars", "told", "score",
    "told_dollars", "told_device_seconds", "judged", "attempts", "attempt_dollars", "escalated",
    "escalated_dollars", "uncapped", "uncapped_dollars", "over_2k", "over_8k", "over_32k", *_AMOUNTS,
    "unverified",
)  # fmt: skip
_COMPARED = "settlement <> 'unsettled' AND comparator_dollars IS NOT NULL AND dollars IS NOT NULL"
_UNVERIFIED = (
    "(verdict IN ('open', 'closed', 'failed') AND \"end\" = 'done' AND status = 200) "
    "OR (escalated_from IS NOT NULL AND note LIKE 'answered with the attempt%')"
)


def upgrade() -> None:
    for table in ("ledger", "rollups"):
        for name in _AMOUNTS:
            op.add_column(table, sa.Column(name, sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("ledger", sa.Column("unverified", sa.Boolean(), server_default="0", nullable=False))
    op.add_column("rollups", sa.Column("unverified", sa.BigInteger(), server_default="0", nullable=False))
    _fill(op.get_bind())


def downgrade() -> None:
    op.execute("DELETE FROM rollups WHERE hours = 720")
    for table in ("rollups", "ledger"):
        for name in ("unverified", *_AMOUNTS):
            op.drop_column(table, name)


def _fill(connection: sa.Connection) -> None:
    true = "1" if connection.dialect.name == "sqlite" else "TRUE"
    connection.execute(sa.text(f"UPDATE ledger SET unverified = {true} WHERE {_UNVERIFIED}"))
    vain = _COMPARED + " AND \"end\" = 'escalated'"
    hour, names = f"at / {_HOUR} * {_HOUR}", ", ".join(_DIMENSIONS)
    found = connection.execute(  # not joined with series: those are found by their names, here
        sa.text(
            f"SELECT {hour}, {names}, SUM(CASE WHEN unverified THEN 1 ELSE 0 END), "
            f"SUM(CASE WHEN {vain} THEN 1 ELSE 0 END) "
            f"FROM ledger WHERE unverified OR ({vain}) GROUP BY {hour}, {names}"
        )
    ).all()
    change = sa.text(
        "UPDATE rollups SET unverified = unverified + :unverified, compared = compared - :vain "
        "WHERE hours = :hours AND start = :start AND series = :series"
    )
    for start, *dimensions, unverified, in_vain in found:
        for hours in (1, 24):
            values = {"hours": hours, "start": start - start % (hours * _HOUR), "series": _id(dimensions)}
            connection.execute(change, {**values, "unverified": int(unverified), "vain": int(in_vain)})
    month = f"start / {720 * _HOUR} * {720 * _HOUR}"
    columns = ", ".join(("hours", "start", "series", *_MEASURES))
    sums = ", ".join(f"SUM({name})" for name in _MEASURES)
    connection.execute(
        sa.text(
            f"INSERT INTO rollups ({columns}) SELECT 720, {month}, series, {sums} "
            f"FROM rollups WHERE hours = 24 GROUP BY {month}, series"
        )
    )


def _id(dimensions: Sequence[Any]) -> bytes:
    return blake2b(msgspec.msgpack.encode(tuple(dimensions)), digest_size=16).digest()
