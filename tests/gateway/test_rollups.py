"""Roll-ups are the sums over the rows, whatever becomes of the rows, over any span and in any groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.ledger import database
from penstock.gateway.ledger.outcomes import Telling, tell
from penstock.gateway.ledger.rollups import (
    DAY,
    DIMENSIONS,
    HOUR,
    MONTH,
    dimensions,
    measures,
    parts_of,
    read,
)
from penstock.gateway.ledger.schema import MEASURES, ledger, metadata, rollups, series
from penstock.gateway.ledger.store import Entry, Position, Store, StoreDown, as_row
from penstock.gateway.policy.amounts import Amounts
from penstock.gateway.records import Row

from .stores import postgres

MOMENTS = st.one_of(st.integers(0, 3 * DAY), st.sampled_from([MONTH - 1, MONTH, MONTH + 3 * HOUR, 2 * MONTH]))
FEW = st.integers(0, 3)
ROWS = st.builds(
    Row,
    id=st.sampled_from("abcd"),
    at=MOMENTS,
    key_id=st.sampled_from(["k1", "k2"]),
    team=st.sampled_from(["", "search"]),
    tags=st.sampled_from([{}, {"feature": "chat"}, {"feature": ""}, {"feature": "é\n'"}]),
    upstream=st.sampled_from(["ours", "cloud"]),
    pool=st.sampled_from(["", "box"]),
    context=st.sampled_from([None, 4096]),
    status=st.sampled_from([200, 499]),
    settlement=st.sampled_from(["settled", "unsettled", "estimated"]),
    input_tokens=st.integers(0, 40_000),
    output_tokens=FEW,
    cached_tokens=FEW,
    device_seconds=st.one_of(st.none(), FEW),
    lost_device_seconds=FEW,
    dollars=st.one_of(st.none(), st.integers(0, 10**15)),
    comparator_dollars=st.one_of(st.none(), FEW),
    escalated_from=st.sampled_from([None, "x", "a", "b"]),
    end=st.sampled_from(["done", "escalated"]),
    verdict=st.sampled_from(["", "failed"]),
    lost_dollars=FEW,
    lost_estimated_dollars=FEW,
    unverified=st.booleans(),
    uncapped=st.booleans(),
)
OUTCOMES = st.sampled_from(["success", "failure", "0.25", "0.123456789", "1"])
STEP = st.one_of(
    st.lists(ROWS, max_size=4),
    st.tuples(st.integers(0, 9), ROWS),
    st.tuples(st.integers(0, 9), OUTCOMES),
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    else:
        store = Store(request.getfixturevalue("server"))
        metadata.drop_all(store.engine)
        with store.engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
    store.open()
    store.register("w")
    yield store
    store.close()


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for many examples, each of which empties it."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'ledger.db'}")
    store.open()
    yield store
    store.close()


@pytest.fixture(scope="module")
def emptied_server(server: str) -> Iterator[Store]:
    store = Store(server)
    metadata.drop_all(store.engine)
    with store.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
    store.open()
    yield store
    store.close()


def empty(store: Store) -> None:
    with store.writing() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    store.rollups._known.clear()
    store.register("w")


def rows_of(store: Store) -> list[tuple[int, Row]]:
    with store.reading() as connection:
        found = connection.execute(sa.select(ledger).order_by(ledger.c.number)).mappings().all()
    return [(each["number"], as_row(each)) for each in found]


def summed(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[Any, ...], list[int]]:
    """As it is specified: row by row."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        values = dict(zip(DIMENSIONS, dimensions(row), strict=True)) | {"day": row.at - row.at % DAY}
        group = tuple(values[name] for name in by)
        old = found.get(group, [0] * len(MEASURES))
        found[group] = [a + int(b) for a, b in zip(old, measures(row), strict=True)]
    return found


def play(store: Store, steps: Sequence[Any]) -> None:
    """Rows are written, settled again as others, and told the outcomes of."""
    empty(store)
    at, number = Position(), 0
    for step in steps:
        if isinstance(step, list):
            entries = [Entry(number + place, row, {}) for place, row in enumerate(step)]
            number += len(step)
            store.apply("w", entries, at, at := Position(0, at.offset + 1))
        elif isinstance(step[1], Row):
            new = step[1]

            def settle(row: Row, new: Row = new) -> Amounts | None:
                for name in ("settlement", "dollars", "device_seconds", "input_tokens", "upstream", "pool"):
                    setattr(row, name, getattr(new, name))
                return None

            store.resettle([("w", step[0])], settle)
        else:
            wanted = [Telling(each.id, step[1]) for number, each in rows_of(store) if number == step[0]]
            tell(store, wanted, now=4 * DAY, since=0)


def check(store: Store, cuts: list[int]) -> None:
    rows = [row for _, row in rows_of(store)]
    spans = list(pairwise([None, *sorted(cuts), None]))
    with store.reading() as connection:
        for by in ((), ("day",), ("team", "pool"), ("day", "feature"), DIMENSIONS):
            assert read(connection, by) == summed(rows, by)
            for since, until in spans:
                within = [
                    row
                    for row in rows
                    if (since is None or since <= row.at) and (until is None or row.at < until)
                ]
                assert read(connection, by, since, until) == summed(within, by)
        some = read(connection, ("model",), equal={"pool": "box", "feature": None})
        assert some == summed([row for row in rows if row.pool == "box" and not row.tags], ("model",))
        whole = read(connection, ("day", "key_id"), conditions=[ledger.c.at >= 0])  # by the rows alone
        assert whole == summed(rows, ("day", "key_id"))
        kept = sa.select(sa.func.count()).select_from(rollups.outerjoin(series)).where(series.c.id.is_(None))
        assert connection.execute(kept).scalar_one() == 0


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEP, max_size=8), cuts=st.lists(MOMENTS, max_size=3))
def test_rollups_are_the_sums_of_the_rows(emptied: Store, steps: list[Any], cuts: list[int]) -> None:
    play(emptied, steps)
    check(emptied, cuts)


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEP, max_size=8), cuts=st.lists(MOMENTS, max_size=3))
def test_in_postgresql_too(emptied_server: Store, steps: list[Any], cuts: list[int]) -> None:
    play(emptied_server, steps)
    check(emptied_server, cuts)


@given(st.one_of(st.none(), MOMENTS), st.one_of(st.none(), MOMENTS))
def test_a_span_is_whole_days_whole_hours_and_edges(since: int | None, until: int | None) -> None:
    parts = list(parts_of(since, until))
    if since is not None and until is not None and since >= until:
        assert parts == []
        return
    assert (parts[0][1], parts[-1][2]) == (since, until)
    assert all(before[2] == after[1] for before, after in pairwise(parts))
    for hours, begin, end in parts:
        width = hours * HOUR or 1
        assert all(each is None or each % width == 0 for each in (begin, end))
        if hours == 0:
            assert begin is not None
            assert end is not None
            assert 0 < end - begin < HOUR


def row(number: int, **fields: Any) -> Row:
    return Row(id=f"r{number}", at=number, key_id="k", settlement="settled", dollars=5, **fields)


def test_what_was_rolled_back_is_written_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A series that was new in a transaction that broke is new in the next one, too."""
    write = store.rollups.write

    def breaks(connection: sa.Connection, changes: Any) -> None:
        write(connection, changes)
        connection.execute(sa.text("SELECT * FROM nowhere"))

    monkeypatch.setattr(store.rollups, "write", breaks)
    with pytest.raises(StoreDown):
        store.apply("w", [Entry(0, row(0), {})], Position(), Position(0, 1))
    monkeypatch.undo()
    store.apply("w", [Entry(0, row(0), {})], Position(), Position(0, 1))
    check(store, [])


def test_the_migration_sums_what_is_there(store: Store) -> None:
    """A ledger of an earlier version has the same sums as if they had been kept from the beginning."""
    from importlib import import_module

    versions = "penstock.gateway.ledger.migrations.versions"
    sums = import_module(f"{versions}.v0005_rollups")
    losses = import_module(f"{versions}.v0008_losses")
    vain = {"end": "escalated", "verdict": "failed", "comparator_dollars": 7}
    rows = [
        row(1, tags={"feature": "chat"}, comparator_dollars=7, input_tokens=3000, device_seconds=4),
        row(2 * DAY, pool="box", status=502, lost_device_seconds=9),
        Row(id="r", at=HOUR, key_id="k", settlement="unsettled", dollars=8, device_seconds=3),
        Row(id="s", at=HOUR, key_id="k", settlement="settled", output_tokens=40_000, escalated_from="r"),
        row(3, status=502, **vain),
        row(DAY, pool="box", status=200, device_seconds=3, **vain),
        row(DAY, pool="box", status=200, device_seconds=3, end="done", verdict="open", unverified=True),
        row(45 * DAY, status=200, end="done", verdict="closed", unverified=True),
        row(46 * DAY, status=200, end="upstream_failed", escalated_from="x", unverified=True,
            note="answered with the attempt (length: failed)"),
        row(47 * DAY, status=200, end="client_gone", verdict="failed"),
    ]  # fmt: skip
    store.apply("w", [Entry(n, each, {}) for n, each in enumerate(rows)], Position(), Position(0, 1))

    def tables() -> list[Any]:
        with store.reading() as connection:
            return [sorted(connection.execute(sa.select(each)).all(), key=repr) for each in (rollups, series)]

    kept = tables()
    with store.writing() as connection:
        connection.execute(rollups.delete())
        connection.execute(series.delete())
        connection.execute(ledger.update().values(unverified=False))
        sums._fill(connection)
        losses._fill(connection)
    assert tables() == kept
    check(store, [HOUR])


def test_an_attempt_in_vain_is_no_request_of_its_own() -> None:
    """It failed nobody, has no outcome, and no cloud would have been asked for it; what it took stays."""
    fields = {"end": "escalated", "status": 502, "comparator_dollars": 7, "device_seconds": 4}
    sums = dict(zip(MEASURES, measures(row(1, outcome="success", uncapped=True, **fields)), strict=True))
    assert [sums[name] for name in ("failed", "told", "score", "comparator_dollars", "uncapped")] == [0] * 5
    assert (sums["compared_dollars"], sums["compared_device_seconds"], sums["attempts"]) == (5, 4, 1)


def test_the_last_migration_is_the_one_of_the_highest_number() -> None:
    """By its file's name the store knows, without alembic, whether there is anything to do."""
    from alembic.script import ScriptDirectory

    folder = Path(database.__file__).parent / "migrations"
    script = ScriptDirectory(folder)
    assert script.get_heads() == [max(path.name[1:5] for path in (folder / "versions").glob("v*.py"))]
