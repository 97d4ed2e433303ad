"""The feed of final bills: a reader with a cursor gets each bill once, and learns which it has missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.server.bills import MOST, Bill, Bills


def feed(*names: str, kept: int = 10) -> Bills:
    bills = Bills(kept)
    for name in names:
        bills.add(Bill(request_id=name))
    return bills


def names(bills: list[Bill]) -> list[str]:
    return [bill.request_id for bill in bills]


@given(st.lists(st.tuples(st.sampled_from(["add", "read"]), st.integers(1, 6))), st.integers(1, 20))
def test_a_reader_gets_each_bill_once_in_order_or_learns_that_it_is_lost(
    actions: list[tuple[str, int]], kept: int
) -> None:
    bills, added, seen, lost = Bills(kept), 0, 0, 0
    cursor = bills.page(None).next
    for action, number in [*actions, *[("read", 5)] * 20]:
        if action == "add":
            for _ in range(number):
                bills.add(Bill(request_id=str(added)))
                added += 1
        else:
            page = bills.page(cursor, number)
            assert page.lost is not None
            lost += page.lost
            assert names(page.data) == [str(seen + lost + index) for index in range(len(page.data))]
            assert len(page.data) <= number
            seen += len(page.data)
            cursor = page.next
    while page.data:
        page = bills.page(cursor)
        seen, cursor = seen + len(page.data), page.next
    assert seen + lost == added


def test_without_a_cursor_all_that_is_there_comes() -> None:
    page = feed("a", "b", "c", kept=2).page(None)
    assert (names(page.data), page.lost) == (["b", "c"], 1)
    assert feed().page(None).data == []


def test_a_cursor_of_an_earlier_start_begins_anew_and_says_so() -> None:
    before = feed("a", "b").page(None).next
    page = feed("c").page(before)
    assert (names(page.data), page.lost) == (["c"], None)


@pytest.mark.parametrize("cursor", ["", ":", "x", "x:", ":1", "x:-1", "x:1.5", "x:" + "9" * 19, "é:²"])
def test_what_is_no_cursor(cursor: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        feed("a").page(cursor)
    assert caught.value.param == "after"


def test_a_cursor_beyond_the_end() -> None:
    bills = feed("a")
    start = bills.page(None).next.partition(":")[0]
    assert bills.page(f"{start}:1").data == []
    with pytest.raises(InvalidRequest, match="beyond"):
        bills.page(f"{start}:2")


@pytest.mark.parametrize("limit", [0, -1, MOST + 1])
def test_how_many_at_once(limit: int) -> None:
    with pytest.raises(InvalidRequest, match=f"from 1 to {MOST}"):
        feed("a").page(None, limit)


def test_bills_of_some_requests_are_found_behind_a_cursor() -> None:
    bills = feed("early")
    cursor = bills.page(None).next
    for name in ("a", "b", "c"):
        bills.add(Bill(request_id=name))
    bills.arrived("d")
    page = bills.find(["a", "c", "d", "early", "never"], cursor)
    assert names(page.data) == ["a", "c"]
    assert (page.under_way, page.lost) == (("d",), 0)
    assert page.next == bills.page(None).next, "all that is there has been looked through"
    assert names(bills.find(["early"], None).data) == ["early"]


def test_who_looks_for_some_learns_what_is_lost_too() -> None:
    cursor = feed().page(None).next
    assert feed("x").find(["x", "y"], cursor).lost is None
    bills = feed(kept=2)
    cursor = bills.page(None).next
    for name in ("a", "b", "c"):
        bills.add(Bill(request_id=name))
    page = bills.find(["a", "b"], cursor)
    assert (names(page.data), page.lost) == (["b"], 1)


def test_too_many_at_a_time_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="101 ids are too many; 100 at a time"):
        feed().find(["x"] * 101, None)


def test_an_id_that_is_repeated_is_under_way_until_the_last_has_left() -> None:
    bills = feed()
    for _ in range(2):
        bills.arrived("a")
    bills.left("a")
    assert bills.find(["a"], None).under_way == ("a",)
    for _ in range(2):
        bills.left("a")
    assert bills.find(["a"], None).under_way == ()
    bills.arrived("a")
    assert bills.find(["a"], None).under_way == ("a",)
