"""The tables. Money is nanodollars, device time nanoseconds times devices, times Unix nanoseconds.

    ledger ── one row a request, never changed but to settle what was unsettled (Store.resettle), and to say
    │         how it turned out
    outcomes ── what was told of them later, one after the other (outcomes.py)
    rollups ─── series   sums of rows by hour and by day (rollups.py)
    paid ──── when the devices of a pool were paid for (idle.py)
    accounts ─┬─ leases ─── workers      the limits' counters (policy/leases.py)
    weights   how routes share out requests, where that is not as the spec has it
    keys      └─ used = Σ of the rows that were charged to it
    objects ── files and batches that upstreams keep, with whose they are

migrations/ makes them; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False, server_default="")


def _count(name: str, kind: type[Integer] = BigInteger) -> Column[int]:
    return Column(name, kind, nullable=False, server_default="0")


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean(create_constraint=False), nullable=False, server_default="0")


ledger = Table(
    "ledger",
    metadata,
    # which worker let the request through, and its number there: clients choose request ids, and repeat them
    Column("worker", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    _text("key_id"),
    _text("key_name"),
    _text("team"),
    Column("feature", Text),  # the tag of that name, which reports group by
    Column("tags", JSON, nullable=False),
    _text("endpoint"),
    _text("route"),
    _text("upstream"),
    _text("replica"),
    _text("model"),
    _count("status", Integer),
    _text("end"),
    _count("attempts", Integer),
    _count("input_tokens"),
    _count("output_tokens"),
    _count("cached_tokens"),
    Column("device_seconds", BigInteger),
    _flag("device_seconds_estimated"),
    _count("lost_device_seconds"),
    Column("failed", JSON(none_as_null=True)),  # attempts that failed: [[upstream, model], …]; null: none
    _text("pool"),
    _text("device"),
    Column("dollars", BigInteger),
    _count("lost_dollars"),  # of attempts at clouds that came to nothing, and what of it is reckoned
    _count("lost_estimated_dollars"),
    Column("comparator_dollars", BigInteger),
    _count("waited"),
    Column("first_byte", BigInteger),
    Column("total", BigInteger),
    _text("settlement"),
    _count("reserved_tokens"),
    _count("reserved_dollars"),
    _count("reserved_device_seconds"),
    # of routes that escalate: the attempt's row has the verdict, and is another one than the final answer's
    Column("escalated_from", Text),  # id of the attempt's row, by the same worker
    _text("verifier"),
    _text("verdict"),
    Column("score", Float),
    _text("reason"),
    _flag("unverified"),
    Column("outcome", Text),
    _text("note"),
    Column("charged", JSON, nullable=False),  # {account: amount}
    Column("owed", JSON(none_as_null=True)),  # attempts whose bills have not come; null: none
    _flag("uncapped"),
    Column("context", BigInteger),
)
Index("ix_ledger_at", ledger.c.at)
Index("ix_ledger_id", ledger.c.id)
for _name in ("key_id", "team", "feature", "route", "pool"):
    Index(f"ix_ledger_{_name}_at", ledger.c[_name], ledger.c.at)
Index(
    "ix_ledger_owed_at",
    ledger.c.at,
    sqlite_where=ledger.c.owed.is_not(None),
    postgresql_where=ledger.c.owed.is_not(None),
)

outcomes = Table(
    "outcomes",
    metadata,
    # of which row, and the how-manieth that was told of it; the last one is the row's
    Column("worker", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("turn", Integer, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),  # success, failure, or a score from 0 to 1
    _text("key_id"),  # who said it; empty: an operator
    ForeignKeyConstraint(["worker", "number"], ["ledger.worker", "ledger.number"]),
)

series = Table(
    "series",
    metadata,
    Column("id", LargeBinary, primary_key=True),
    _text("key_id"),
    _text("key_name"),
    _text("team"),
    Column("feature", Text),
    _text("route"),
    _text("upstream"),
    _text("model"),
    _text("pool"),
    Column("context", BigInteger),
)

MEASURES = (
    "requests",
    "failed",  # answered with 400 or more
    "unsettled",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "dollars",
    "unsettled_dollars",  # of these, reserved and not known
    "unpriced",  # requests that used something at no known price
    "device_seconds",  # as far as they are known
    "unsettled_device_seconds",
    "lost_device_seconds",
    "compared",  # requests with a comparator's price and one of their own; what these and attempts for them
    # took, and what the comparator would take, which is asked once
    "compared_dollars",
    "compared_device_seconds",
    "comparator_dollars",
    "told",  # requests with an outcome; its score in billionths, and what these took
    "score",
    "told_dollars",
    "told_device_seconds",
    "judged",  # attempts that a verifier looked at; those that were in vain, and what they took
    "attempts",
    "attempt_dollars",
    "escalated",  # answers that came after one of these
    "escalated_dollars",
    "uncapped",
    "uncapped_dollars",
    "over_2k",  # requests of more tokens than that, prompt and answer together
    "over_8k",
    "over_32k",
    "lost_dollars",  # what clouds took for attempts that came to nothing; not in `dollars`
    "lost_estimated_dollars",  # of these, reckoned and not told
    "unverified",  # answers given that no verifier had passed
)
"""What is summed; rollups.py says of which rows."""

rollups = Table(
    "rollups",
    metadata,
    Column("hours", Integer, primary_key=True, autoincrement=False),  # 1, 24 or 720
    Column("start", BigInteger, primary_key=True, autoincrement=False),
    Column("series", LargeBinary, ForeignKey("series.id"), primary_key=True),
    *(_count(name) for name in MEASURES),
    sqlite_with_rowid=False,
)

paid = Table(
    "paid",
    metadata,
    # each gateway says it for itself, and extends its own row: idle.py takes them together
    Column("pool", Text, primary_key=True),
    Column("worker", Text, primary_key=True),
    Column("begin", BigInteger, primary_key=True, autoincrement=False),
    Column("until", BigInteger, nullable=False),
    _text("device"),
    _count("devices", Integer),
    _count("taken", Integer),  # devices that its engines take: more than there are, if they share one
    Column("price_per_hour", BigInteger),  # of one device
)
Index("ix_paid_pool_until", paid.c.pool, paid.c.until)

accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),  # scope|unit|window|start
    Column("scope", Text, nullable=False),
    Column("unit", Text, nullable=False),
    Column("window", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    _count("used"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    _text("host"),
    Column("seen", Float, nullable=False),
    Column("gone", Float),  # when it ended, or was found dead
    # how far its journal is in the ledger
    _count("segment"),
    _count("offset"),
    _flag("done"),
)

leases = Table(
    "leases",
    metadata,
    Column("account", Text, ForeignKey("accounts.id"), primary_key=True),
    Column("worker", Text, ForeignKey("workers.id"), primary_key=True),
    _count("granted"),
    Column("wanted_since", Float),  # its mark: short since then, and waiting for the others
    Column("touched", Float, nullable=False),  # the newest mark of others that it has answered
)
Index("ix_leases_worker", leases.c.worker)
Index(
    "ix_leases_wanted_since",
    leases.c.wanted_since,
    sqlite_where=leases.c.wanted_since.is_not(None),
    postgresql_where=leases.c.wanted_since.is_not(None),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    _text("name"),
    _text("team"),
    Column("tags", JSON, nullable=False),
    Column("routes", JSON),  # null: all
    Column("limits", JSON),  # as in the spec; null: the team's or everybody's
    _flag("local_only"),
    Column("service_class", Text, nullable=False, server_default="realtime"),
    Column("digest", LargeBinary, nullable=False, unique=True),  # sha256 of the secret, which has 256 bits
    Column("old_digest", LargeBinary, unique=True),  # of the secret before `rotate`
    Column("old_until", BigInteger),
    _text("hint"),  # the secret's last characters
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    Column("revoked", BigInteger),
)

objects = Table(
    "objects",
    metadata,
    Column("replica", Text, primary_key=True),
    Column("id", Text, primary_key=True),  # the upstream's
    Column("kind", Text, nullable=False),  # file, batch
    Column("key_id", Text, nullable=False),
    _text("purpose"),  # of a file
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    _text("state"),  # of a batch: asked, running, over
    _count("checked"),  # when its upstream was last asked about it
    Column("body", LargeBinary, nullable=False),  # what the upstream said of it last, JSON
    Column("about", LargeBinary, nullable=False),  # what the gateway knows of it, JSON
)
Index("ix_objects_key_id_kind_created", objects.c.key_id, objects.c.kind, objects.c.created)
Index(
    "ix_objects_checked",
    objects.c.checked,
    sqlite_where=text("state IN ('asked', 'running')"),
    postgresql_where=text("state IN ('asked', 'running')"),
)

weights = Table(
    "weights",
    metadata,
    Column("route", Text, primary_key=True),
    Column("targets", JSON, nullable=False),  # [{"model", "upstream", "weight"}, …]: what they are now
    Column("instead", JSON, nullable=False),  # the spec's own, in place of which these stand
    Column("changed", BigInteger, nullable=False),
    _text("note"),
)

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    # keys, weights: grow with every change of a key, of a route's weights
    Column("value", BigInteger, nullable=False),
)
