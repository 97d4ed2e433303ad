"""Outcomes of requests, sums of rows by hour and by day, and what reports ask of rows besides.

The sums of a ledger that is there already are made here, once.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_HOUR = 3600 * 10**9
_DIMENSIONS = ("key_id", "key_name", "team", "feature", "route", "upstream", "model", "pool", "context")
_KNOWN = "settlement <> 'unsettled'"
_LENGTH = "input_tokens + output_tokens"
_COMPARED = f"{_KNOWN} AND comparator_dollars IS NOT NULL AND dollars IS NOT NULL"
_DEVICE = "COALESCE(device_seconds, 0)"
_ATTEMPT = "\"end\" = 'escalated'"


def _count(condition: str) -> str:
    return f"CASE WHEN {condition} THEN 1 ELSE 0 END"


# nothing has told outcomes before, and no row was said to be without a bound
_MEASURES = {
    "requests": "1",
    "failed": _count(f"status >= 400 AND NOT ({_ATTEMPT})"),
    "unsettled": _count("settlement = 'unsettled'"),
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cached_tokens": "cached_tokens",
    "dollars": "COALESCE(dollars, 0)",
    "unsettled_dollars": f"CASE WHEN {_KNOWN} THEN 0 ELSE COALESCE(dollars, 0) END",
    "unpriced": _count(f"dollars IS NULL AND ({_LENGTH} > 0 OR {_DEVICE} > 0)"),
    "device_seconds": f"CASE WHEN {_KNOWN} THEN {_DEVICE} ELSE 0 END",
    "unsettled_device_seconds": f"CASE WHEN {_KNOWN} THEN 0 ELSE {_DEVICE} END",
    "lost_device_seconds": "lost_device_seconds",
    "compared": _count(_COMPARED),
    "compared_dollars": f"CASE WHEN {_COMPARED} THEN dollars ELSE 0 END",
    "compared_device_seconds": f"CASE WHEN {_COMPARED} THEN {_DEVICE} ELSE 0 END",
    "comparator_dollars": f"CASE WHEN {_COMPARED} AND NOT ({_ATTEMPT}) THEN comparator_dollars ELSE 0 END",
    "told": "0",
    "score": "0",
    "told_dollars": "0",
    "told_device_seconds": "0",
    "judged": _count("verdict <> ''"),
    "attempts": _count(_ATTEMPT),
    "attempt_dollars": f"CASE WHEN {_ATTEMPT} THEN COALESCE(dollars, 0) ELSE 0 END",
    "escalated": _count("escalated_from IS NOT NULL"),
    "escalated_dollars": "CASE WHEN escalated_from IS NOT NULL THEN COALESCE(dollars, 0) ELSE 0 END",
    "uncapped": "0",
    "uncapped_dollars": "0",
    "over_2k": _count(f"{_LENGTH} > 2048"),
    "over_8k": _count(f"{_LENGTH} > 8192"),
    "over_32k": _count(f"{_LENGTH} > 32768"),
}


def upgrade() -> None:
    op.add_column("ledger", sa.Column("uncapped", sa.Boolean(), server_default="0", nullable=False))
    op.add_column("ledger", sa.Column("context", sa.BigInteger(), nullable=True))
    op.create_table(
        "outcomes",
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("turn", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(
            ["worker", "number"], ["ledger.worker", "ledger.number"], name="fk_outcomes_worker"
        ),
        sa.PrimaryKeyConstraint("worker", "number", "turn", name="pk_outcomes"),
    )
    op.create_table(
        "series",
        sa.Column("id", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.Text(), server_default="", nullable=False),
        sa.Column("key_name", sa.Text(), server_default="", nullable=False),
        sa.Column("team", sa.Text(), server_default="", nullable=False),
        sa.Column("feature", sa.Text(), nullable=True),
        sa.Column("route", sa.Text(), server_default="", nullable=False),
        sa.Column("upstream", sa.Text(), server_default="", nullable=False),
        sa.Column("model", sa.Text(), server_default="", nullable=False),
        sa.Column("pool", sa.Text(), server_default="", nullable=False),
        sa.Column("context", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_series"),
    )
    op.create_table(
        "rollups",
        sa.Column("hours", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("series", sa.LargeBinary(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), server_default="0", nullable=False) for name in _MEASURES),
        sa.ForeignKeyConstraint(["series"], ["series.id"], name="fk_rollups_series"),
        sa.PrimaryKeyConstraint("hours", "start", "series", name="pk_rollups"),
        sqlite_with_rowid=False,
    )
    _fill(op.get_bind())


def downgrade() -> None:
    for table in ("rollups", "series", "outcomes"):
        op.drop_table(table)
    for name in ("context", "uncapped"):
        op.drop_column("ledger", name)


def _fill(connection: sa.Connection) -> None:
    """In the database but for the names of series, which no database can make."""
    names = ", ".join(_DIMENSIONS)
    series = sa.table("series", *(sa.column(name) for name in ("id", *_DIMENSIONS)))
    found = connection.execute(sa.text(f"SELECT DISTINCT {names} FROM ledger")).all()
    for first in range(0, len(found), 1000):
        rows = [
            dict(zip(("id", *_DIMENSIONS), (_id(each), *each), strict=True))
            for each in found[first : first + 1000]
        ]
        connection.execute(sa.insert(series), rows)
    sqlite = connection.dialect.name == "sqlite"
    same, join = ("IS", "CROSS JOIN") if sqlite else ("IS NOT DISTINCT FROM", "JOIN")  # rows first, in SQLite
    nullable = ("feature", "context")
    joined = " AND ".join(
        f"series.{name} {same if name in nullable else '='} ledger.{name}" for name in _DIMENSIONS
    )
    hour = f"ledger.at / {_HOUR} * {_HOUR}"
    columns = ", ".join(("hours", "start", "series", *_MEASURES))
    sums = ", ".join(f"SUM({expression})" for expression in _MEASURES.values())
    hourly = sa.text(
        f"INSERT INTO rollups ({columns}) SELECT 1, {hour}, series.id, {sums} FROM ledger {join} series "
        f"ON {joined} WHERE ledger.at >= :begin AND ledger.at < :end GROUP BY {hour}, series.id"
    )
    connection.execute(sa.text(f"CREATE INDEX ix_series_found ON series ({names})"))
    at = connection.execute(sa.text("SELECT MIN(at) FROM ledger")).scalar_one()
    while at is not None:  # by the day: what is sorted fits into memory
        begin = at // (24 * _HOUR) * 24 * _HOUR
        connection.execute(hourly, {"begin": begin, "end": begin + 24 * _HOUR})
        later = sa.text("SELECT MIN(at) FROM ledger WHERE at >= :end")
        at = connection.execute(later, {"end": begin + 24 * _HOUR}).scalar_one()
    connection.execute(sa.text("DROP INDEX ix_series_found"))
    day = f"start / {24 * _HOUR} * {24 * _HOUR}"
    sums = ", ".join(f"SUM({name})" for name in _MEASURES)
    connection.execute(
        sa.text(
            f"INSERT INTO rollups ({columns}) SELECT 24, {day}, series, {sums} "
            f"FROM rollups WHERE hours = 1 GROUP BY {day}, series"
        )
    )


def _id(dimensions: Sequence[Any]) -> bytes:
    return blake2b(msgspec.msgpack.encode(tuple(dimensions)), digest_size=16).digest()
