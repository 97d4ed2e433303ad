"""Rows that are settled after they were written: figures, accounts, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.ledger.schema import accounts, ledger, metadata, workers
from penstock.gateway.ledger.store import Entry, Position, Store
from penstock.gateway.policy.amounts import Amounts
from penstock.gateway.records import Asked, Rate, Row

from .stores import postgres

DAY = "team:t|dollars|day|0"
TIME = "key:k|device_seconds|month|0"
ASKED = Asked(replica="ours/0", upstream="ours", model="tiny", bill="b1", price=Rate(5, 7, None, 1))


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


def waiting(number: int, dollars: int) -> Entry:
    row = Row(
        id=f"r{number}", at=number, key_id="k", tags={"feature": "x"}, settlement="unsettled", owed=(ASKED,)
    )
    row.dollars = row.reserved_dollars = dollars
    return Entry(number, row, {DAY: dollars, TIME: 10 * dollars})


def written(store: Store, *entries: Entry) -> None:
    store.apply("w", entries, Position(), Position(0, 1))


def used(store: Store) -> dict[str, int]:
    with store.reading() as connection:
        return dict(connection.execute(sa.select(accounts.c.id, accounts.c.used)).all())


def to(dollars: int, seconds: int):  # type: ignore[no-untyped-def]
    def settle(row: Row) -> Amounts | None:
        if row.settlement != "unsettled":
            return None
        row.settlement, row.dollars, row.device_seconds, row.owed = "settled", dollars, seconds, ()
        return Amounts(dollars=dollars, device_seconds=seconds)

    return settle


def test_row_and_accounts_change_together_and_once(store: Store) -> None:
    written(store, waiting(0, 100), waiting(1, 50))
    [(worker, number, row), (_, other, _)] = store.owed(0, 10)
    assert (worker, number, other, row) == ("w", 0, 1, waiting(0, 100).row)
    assert store.resettle([(worker, number), ("w", 77)], to(30, 4)) == {DAY: -70, TIME: -996}
    assert store.resettle([(worker, number)], to(30, 4)) == {}
    assert used(store) == {DAY: 80, TIME: 504}
    assert [place[:2] for place in store.owed(0, 10)] == [("w", 1)]
    assert store.owed(2, 10) == []
    with store.reading() as connection:
        found = connection.execute(sa.select(ledger).where(ledger.c.number == 0)).mappings().one()
    assert (found["settlement"], found["dollars"], found["device_seconds"]) == ("settled", 30, 4)
    assert (found["charged"], found["owed"], found["feature"]) == ({DAY: 30, TIME: 4}, None, "x")


def test_more_than_was_reserved_is_charged_too(store: Store) -> None:
    written(store, waiting(0, 100))
    assert store.resettle([("w", 0)], to(130, 1000)) == {DAY: 30}
    assert used(store) == {DAY: 130, TIME: 1000}


def test_what_breaks_in_the_middle_changes_nothing(store: Store) -> None:
    written(store, waiting(0, 100), waiting(1, 50))

    def breaks(row: Row) -> Amounts:
        if row.id == "r1":
            raise RuntimeError
        row.settlement = "settled"
        return Amounts()

    with pytest.raises(RuntimeError):
        store.resettle([("w", 0), ("w", 1)], breaks)
    assert used(store) == {DAY: 150, TIME: 1500}
    assert len(store.owed(0, 10)) == 2


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for many examples, each of which empties it."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'ledger.db'}")
    store.open()
    yield store
    store.close()


@settings(max_examples=20, deadline=None)
@given(
    reserved=st.lists(st.integers(0, 10**12), min_size=1, max_size=6),
    ended=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**12), st.booleans()), max_size=12),
)
def test_the_accounts_are_the_rows_whatever_is_settled(
    emptied: Store, reserved: list[int], ended: list[tuple[int, int, bool]]
) -> None:
    store = emptied
    with store.writing() as connection:
        for table in (ledger, accounts, workers):
            connection.execute(table.delete())
    store.register("w")
    written(store, *(waiting(number, amount) for number, amount in enumerate(reserved)))
    for number, amount, repeated in ended:
        for _ in range(1 + repeated):
            store.resettle([("w", number)], to(amount, 2 * amount))
    with store.reading() as connection:
        rows = connection.execute(sa.select(ledger.c.charged)).scalars().all()
    sums = {id: sum(row[id] for row in rows) for id in (DAY, TIME)}
    assert used(store) == sums
