"""Every dollar of a ledger, and of what was paid and not used, is in exactly one line of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.costs import patterns, records
from penstock.gateway.costs.allocate import divide
from penstock.gateway.costs.read import BY, Found, Wanted, find
from penstock.gateway.costs.report import NOBODY, Report
from penstock.gateway.costs.show import remarks, shortened, without_days
from penstock.gateway.ledger.idle import claim
from penstock.gateway.ledger.outcomes import Telling, tell
from penstock.gateway.ledger.rollups import DAY, HOUR
from penstock.gateway.ledger.schema import metadata
from penstock.gateway.ledger.store import Entry, Position, Store
from penstock.gateway.policy.idle import Terms
from penstock.gateway.records import Row
from tests.gateway.stores import postgres

NOW = 5 * DAY
MOMENT = st.integers(0, 4 * DAY)
ROWS = st.builds(
    Row,
    id=st.sampled_from("abc"),
    at=MOMENT,
    key_id=st.sampled_from(["k1", "k2"]),
    team=st.sampled_from(["", "search", "care"]),
    tags=st.sampled_from([{}, {"feature": "chat"}, {"feature": "rag", "user": "u"}]),
    route=st.sampled_from(["small", "large"]),
    upstream=st.sampled_from(["ours", "cloud"]),
    model=st.sampled_from(["m", "n"]),
    pool=st.sampled_from(["", "box", "gpu"]),
    settlement=st.sampled_from(["settled", "settled", "unsettled", "estimated"]),
    input_tokens=st.integers(0, 3000),
    device_seconds=st.one_of(st.none(), st.integers(0, 10**12)),
    lost_device_seconds=st.integers(0, 10),
    lost_dollars=st.sampled_from([0, 0, 1, 10**9 + 7]),
    dollars=st.one_of(st.none(), st.integers(0, 10**15)),
    comparator_dollars=st.one_of(st.none(), st.integers(0, 10**15)),
    end=st.sampled_from(["done", "escalated"]),
)
CLAIMS = st.lists(
    st.tuples(
        st.sampled_from(["box", "gpu", "spare"]),
        MOMENT,
        st.integers(1, 2 * DAY),
        st.integers(1, 3),
        st.one_of(st.none(), st.integers(0, 10**10)),
    ),
    max_size=4,
)
GROUPS = st.lists(st.sampled_from(sorted(BY)), unique=True, max_size=4)
SPAN = st.one_of(st.none(), MOMENT)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for many examples, each of which empties it."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'ledger.db'}")
    store.open()
    yield store
    store.close()


_workers = count()


def fill(store: Store, rows: Sequence[Row], claims: Sequence[Any] = ()) -> None:
    with store.writing() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    store.rollups._known.clear()
    worker = f"w{next(_workers)}"
    store.register(worker)
    store.apply(worker, [Entry(n, row, {}) for n, row in enumerate(rows)], Position(), Position(0, 1))
    for number, (pool, begin, length, devices, price) in enumerate(claims):
        terms = {pool: Terms(devices, price, devices, "L4")}
        claim(store, f"c{number}", terms, {pool: begin}, begin + length)


def value(row: Row, name: str) -> Any:
    if name == "feature":
        return row.tags.get("feature")
    return row.at // DAY * DAY if name == "day" else getattr(row, name)


def check(found: Found, rows: Sequence[Row], by: Sequence[str], *, whole: bool = True) -> None:
    report = found.report
    columns = [name for each in by for name in BY[each]]
    assert len({line.group for line in report.lines}) == len(report.lines)
    for line in report.lines:
        here = [row for row in rows if tuple(value(row, name) for name in columns) == line.group]
        assert line.sums["dollars"] == sum(row.dollars or 0 for row in here)
        assert line.cost - line.idle == sum((row.dollars or 0) + row.lost_dollars for row in here)
        assert line.sums["requests"] == len(here)
    total = report.total
    assert total.sums["dollars"] == sum(row.dollars or 0 for row in rows)
    assert total.cost == sum(line.cost for line in report.lines)
    assert total.cost - total.idle == sum((row.dollars or 0) + row.lost_dollars for row in rows)
    idle = sum(use.idle or 0 for use in report.pools)
    if whole:
        assert total.idle == sum(line.idle for line in report.lines) == idle
        paid = sum(use.paid or 0 for use in report.pools)
        charged = sum(use.charged for use in report.pools if use.paid is not None)
        assert idle == paid - charged
    for short in (shortened(report, 2), without_days(report), shortened(without_days(report), 1)):
        assert sum(line.cost for line in short.lines) == total.cost
    told = list(records.lines(report))
    assert sum(each["cost_dollars"] for each in told) == records.figures(total)["cost_dollars"]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, max_size=10), claims=CLAIMS, by=GROUPS, since=SPAN, until=SPAN)
def test_every_dollar_is_in_exactly_one_line(
    store: Store, rows: list[Row], claims: list[Any], by: list[str], since: int | None, until: int | None
) -> None:
    fill(store, rows, claims)
    found = find(store, by, Wanted(since, until), NOW)
    within = [row for row in rows if (since is None or since <= row.at) and (until is None or row.at < until)]
    check(found, within, by)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(ROWS, max_size=10), claims=CLAIMS, by=GROUPS)
def test_parts_of_a_ledger_add_up_to_it(
    store: Store, rows: list[Row], claims: list[Any], by: list[str]
) -> None:
    """What is asked for team by team is what all teams have, but for what nobody used."""
    fill(store, rows, claims)
    whole = find(store, by, Wanted(), NOW).report
    teams = sorted({row.team for row in rows})
    parts = [find(store, by, Wanted(equal={"team": team}), NOW) for team in teams]
    for team, part in zip(teams, parts, strict=True):
        check(part, [row for row in rows if row.team == team], by, whole=False)
    lines = find(store, ["team", *(["day"] if "day" in by else [])], Wanted(), NOW).report.lines
    unused = sum(line.idle for line in lines if not line.sums["requests"])
    asked = sum(part.report.total.cost for part in parts)
    assert abs(asked + unused - whole.total.cost) <= 3 * len(teams) * 5  # each division rounds for itself


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=8), claims=CLAIMS, cuts=st.lists(MOMENT, max_size=2))
def test_days_add_up_to_their_span(store: Store, rows: list[Row], claims: list[Any], cuts: list[int]) -> None:
    fill(store, rows, claims)
    for since, until in pairwise([None, *sorted(cuts), None]):
        span = Wanted(since, until)
        daily, whole = find(store, ["day"], span, NOW).report, find(store, [], span, NOW).report
        assert daily.total.cost == whole.total.cost
        assert daily.pools == whole.pools


def test_a_tag_that_rollups_do_not_have_is_read_from_the_rows(store: Store) -> None:
    rows = [
        Row(id="a", at=HOUR, key_id="k", tags={"user": "u"}, settlement="settled", dollars=3),
        Row(id="b", at=HOUR, key_id="k", tags={"user": "v"}, settlement="settled", dollars=4),
    ]
    fill(store, rows)
    assert find(store, ["key"], Wanted(tags=(("user", "u"),)), NOW).report.total.cost == 3


def test_in_postgresql_too() -> None:
    rows = [
        Row(id="a", at=DAY, key_id="k", team="t", pool="box", settlement="settled", dollars=3,
            device_seconds=5),
        Row(id="b", at=DAY, key_id="l", team="u", pool="box", settlement="settled", dollars=4,
            device_seconds=7),
        Row(id="c", at=2 * DAY, key_id="l", team="u", settlement="settled", dollars=9, comparator_dollars=8),
    ]  # fmt: skip
    with postgres() as url:
        store = Store(url)
        store.open()
        fill(store, rows, [("box", 0, 3 * DAY, 1, 10**9), ("spare", 0, DAY, 1, 7)])
        for by in ([], ["day"], ["team", "day"], ["key", "pool"]):
            check(find(store, by, Wanted(), NOW), rows, by)
        tagged = find(store, ["key"], Wanted(tags=(("user", "u"),)), NOW)
        assert tagged.report.total.sums["dollars"] == 0
        store.close()


def one(report: Report, **group: Any) -> Any:
    [line] = [line for line in report.lines if dict(zip(report.by, line.group, strict=True)) == group]
    return line


def test_idle_goes_to_who_used_the_pool_and_what_nobody_used_to_nobody(store: Store) -> None:
    """By the day where days are asked for, and else over the span."""
    rows = [
        Row(id="a", at=1, key_id="k", team="t", pool="box", settlement="settled", dollars=10,
            device_seconds=1),
        Row(id="b", at=2, key_id="k", team="u", pool="box", settlement="settled", dollars=30,
            device_seconds=3),
    ]  # fmt: skip
    fill(store, rows, [("box", 0, 2 * DAY, 1, 100)])
    report = find(store, ["team"], Wanted(), NOW).report
    assert [(line.group, line.idle) for line in report.lines] == [(("u",), 3570), (("t",), 1190)]
    daily = find(store, ["day", "team"], Wanted(), NOW).report
    assert [(line.group, line.cost) for line in daily.lines] == [
        ((0, "u"), 30 + 1770), ((0, "t"), 10 + 590), ((DAY, NOBODY), 2400),
    ]  # fmt: skip


def test_the_figures_of_a_line(store: Store) -> None:
    common = {"key_id": "k", "pool": "box", "settlement": "settled", "comparator_dollars": 50}
    rows = [
        Row(id="a", at=1, dollars=10, device_seconds=10, tags={"feature": "x"}, **common),
        Row(id="b", at=2, dollars=30, device_seconds=30, tags={"feature": "x"}, **common),
        Row(id="c", at=3, key_id="k", settlement="settled", dollars=500, tags={"feature": "x"}),
    ]
    fill(store, rows, [("box", 0, HOUR, 1, 200)])
    tell(store, [Telling("a", "success"), Telling("b", "0.5")], now=NOW, since=0)
    line = one(find(store, ["feature"], Wanted(), NOW).report, feature="x")
    assert (line.idle, line.cost) == (160, 700)
    assert line.successes == Fraction(3, 2)
    assert line.cost_per_success == (40 + 160) / Fraction(3, 2)
    assert (line.compared_cost, line.comparator) == (200, 100)
    assert line.break_even == Fraction(40, 100)


def test_an_attempt_in_vain_saves_nothing(store: Store) -> None:
    """Without it the cloud would have been asked once, as it was."""
    rows = [
        Row(id="a.attempt", at=1, key_id="k", pool="box", settlement="settled", dollars=3 * 10**9, status=502,
            device_seconds=9, comparator_dollars=2 * 10**9, end="escalated", verdict="failed"),
        Row(id="a", at=2, key_id="k", settlement="settled", dollars=40 * 10**9, status=200,
            escalated_from="a.attempt"),
    ]  # fmt: skip
    fill(store, rows, [("box", 0, HOUR, 1, 3 * 10**9)])
    total = find(store, [], Wanted(), NOW).report.total
    assert (total.compared_cost, total.comparator, total.break_even) == (3 * 10**9, 0, None)
    assert (total.requests, total.sums["failed"]) == (1, 0)


@pytest.mark.parametrize(
    ("wanted", "whole"),
    [
        (Wanted(), True),
        (Wanted(0, DAY), True),
        (Wanted(equal={"pool": "box"}), True),
        (Wanted(equal={"team": "t"}), False),
        (Wanted(equal={"pool": "box", "route": ""}), False),
        (Wanted(tags=(("user", "u"),)), False),
    ],
)
def test_what_a_pool_was_used_for_by_all_is_not_said_of_some(
    store: Store, wanted: Wanted, whole: bool
) -> None:
    """How much of what was paid for was used is known of a pool, and not of a team's part of it."""
    common = {"key_id": "k", "pool": "box", "settlement": "settled", "comparator_dollars": 10**9}
    rows = [
        Row(id="a", at=1, team="t", dollars=10**7, device_seconds=1, tags={"user": "u"}, **common),
        Row(id="b", at=2, team="u", dollars=10**7, device_seconds=1, **common),
    ]
    fill(store, rows, [("box", 0, DAY, 1, 10**9)])
    found = find(store, [], wanted, NOW)
    said = "\n".join(patterns.verdicts(found.report, found.days, whole=found.whole))
    findings = patterns.find(found.report, found.seen, found.days, whole=found.whole)
    assert found.whole is whole
    assert ("requests a day like these" in said) is whole
    assert ("; it was" in said, "by the requests of all who use them, was" in said) == (whole, not whole)
    assert ("idle_devices" in {each.kind for each in findings}) is whole


def test_what_attempts_in_vain_took_is_in_the_cost_and_said(store: Store) -> None:
    rows = [
        Row(id="a.attempt", at=1, key_id="k", settlement="settled", lost_dollars=3 * 10**9, end="escalated",
            lost_estimated_dollars=10**9, verdict="failed", tags={"feature": "x"}),
        Row(id="a", at=2, key_id="k", settlement="settled", dollars=4 * 10**9, escalated_from="a.attempt",
            tags={"feature": "x"}, unverified=True),
    ]  # fmt: skip
    fill(store, rows)
    report = find(store, ["feature"], Wanted(), NOW).report
    told = records.figures(one(report, feature="x"))
    assert (told["dollars"], told["lost_dollars"], told["lost_estimated_dollars"]) == (4, 3, 1)
    assert (told["cost_dollars"], told["attempt_dollars"], told["unverified_requests"]) == (7, 3, 1)
    lost, unverified = remarks(report)
    assert "took $3.00" in lost
    assert "$1.00 of it is estimated" in lost
    assert unverified.startswith("1 answers were given although no verifier had passed them")


def test_an_attempt_alone_is_compared_with_nothing(store: Store) -> None:
    """No cloud would have been asked for it: its price for the same tokens is not zero dollars."""
    row = Row(id="a.attempt", at=1, key_id="k", pool="box", settlement="settled", dollars=3 * 10**9,
              device_seconds=9, comparator_dollars=2 * 10**9, end="escalated", verdict="failed")  # fmt: skip
    fill(store, [row], [("box", 0, HOUR, 1, 3 * 10**9)])
    found = find(store, [], Wanted(), NOW)
    [said] = patterns.verdicts(found.report, found.days, whole=found.whole)
    assert "only attempts in vain" in said
    answered = Row(id="b", at=1, key_id="k", pool="box", settlement="settled", dollars=10**9,
                   device_seconds=3, comparator_dollars=9 * 10**9)  # fmt: skip
    fill(store, [row, answered], [("box", 0, HOUR, 1, 4 * 10**9)])
    found = find(store, [], Wanted(), NOW)
    said = next(patterns.verdicts(found.report, found.days, whole=found.whole))
    assert said.startswith("Self-hosting pays: it cost $4.00 with its idle time, and the cloud takes $9.00")
    assert "requests, which have a comparator" not in said  # the attempt is none of them
    assert records.figures(found.report.total)["compared_requests"] == 1


def test_what_is_not_known_is_absent(store: Store) -> None:
    fill(store, [Row(id="a", at=1, key_id="k", pool="box", settlement="settled", device_seconds=4)])
    [told] = records.lines(find(store, ["pool"], Wanted(), NOW).report)
    absent = ("comparator_dollars", "self_hosted_dollars", "break_even_utilization", "successes")
    assert all(told[name] is None for name in (*absent, "dollars_per_success", "escalation_rate"))
    assert (told["unpriced_requests"], told["requests"]) == (1, 1)
    [use] = find(store, [], Wanted(), NOW).report.pools
    assert records.pool(use)["paid_dollars"] is None


def test_an_empty_ledger_has_no_lines(store: Store) -> None:
    fill(store, [])
    for by in ([], ["day", "team"]):
        found = find(store, by, Wanted(), NOW)
        assert (found.report.lines, found.report.total.cost, found.days) == ([], 0, 0)


@given(st.integers(-(10**18), 10**18), st.lists(st.integers(0, 10**15), min_size=1))
def test_division_loses_nothing_and_is_fair(amount: int, weights: list[int]) -> None:
    if not any(weights):
        weights[0] = 1
    parts = divide(amount, weights)
    assert sum(parts) == amount
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(amount * weight, sum(weights))) < 1
