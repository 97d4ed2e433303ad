"""Habits that cost: each is found where it is, with its dollars, and not where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from penstock.gateway.costs.evaluations import Evaluation
from penstock.gateway.costs.findings import Finding, Seen
from penstock.gateway.costs.patterns import find, verdicts, wilson, worst_difference
from penstock.gateway.costs.report import PoolUse, build
from penstock.gateway.ledger.schema import MEASURES

DOLLAR = 10**9


def sums(**given: int) -> dict[str, int]:
    return {**dict.fromkeys(MEASURES, 0), **given}


def feature(*group: Any, **given: int) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Of (feature, route, upstream, model, pool, context)."""
    defaults = ("chat", "small", "ours", "m", "", None)
    return (*group, *defaults[len(group) :]), sums(**given)


def found(
    *features: tuple[tuple[Any, ...], dict[str, int]],
    pools: tuple[PoolUse, ...] = (),
    untagged: dict[tuple[Any, ...], dict[str, int]] | None = None,
    days: float = 10.0,
    evaluations: Sequence[Evaluation] = (),
) -> list[Finding]:
    report = build([], {("",): sums()}, [], span=pools, names=MEASURES)
    return find(report, Seen(dict(features), untagged or {}), days, evaluations=evaluations)


def only(some: list[Finding], kind: str) -> Finding:
    [one] = [each for each in some if each.kind == kind]
    return one


def kinds(some: list[Finding]) -> set[str]:
    return {each.kind for each in some}


def use(paid: int, charged: int) -> PoolUse:
    return PoolUse(pool="gpu", day=None, paid=paid, charged=charged, device_seconds=charged)


def test_ten_requests_a_day_on_a_gpu() -> None:
    rows = feature("x", "r", "u", "m", "gpu", requests=100, compared=100, comparator_dollars=DOLLAR // 10)
    one = only(found(rows, pools=(use(170 * DOLLAR, DOLLAR // 2),)), "idle_devices")
    assert one.dollars == 170 * DOLLAR - DOLLAR // 2
    assert "10 requests a day" in one.text
    assert "takes $0.1 for the same tokens" in one.text
    assert "idle_devices" not in kinds(found(rows, pools=(use(170 * DOLLAR, 10 * DOLLAR),)))


def compared(cheap: int, dear: int, told: int = 200, price: int = 10) -> list[Finding]:
    """Two models on one feature, that succeed so often among `told` outcomes."""
    return found(
        feature("x", "r", "u", "small", requests=1000, dollars=1000, told=told, score=cheap * DOLLAR),
        feature("x", "r", "u", "large", requests=1000, dollars=1000 * price, told=told, score=dear * DOLLAR),
    )


def test_a_large_model_where_a_small_one_passes() -> None:
    one = only(compared(190, 190), "large_model")
    assert (one.subject, one.dollars) == ("feature x", 9000)
    assert "large costs" in one.text
    assert "95.0 % of 200" in one.text


@pytest.mark.parametrize(
    ("cheap", "dear", "told", "price"),
    [(150, 190, 200, 10), (18, 18, 19, 10), (10, 10, 10, 10), (190, 190, 200, 1), (176, 190, 200, 10)],
)
def test_where_it_does_not_pass_or_nobody_knows_nothing_is_said(
    cheap: int, dear: int, told: int, price: int
) -> None:
    """Worse, too few outcomes, not cheaper, not proven to be as good."""
    assert "large_model" not in kinds(compared(cheap, dear, told, price))


def test_models_of_which_one_gets_what_the_other_failed_are_not_compared() -> None:
    """The successes of the cheap one are those that passed, and the dear one has the hard ones alone."""
    known = {"requests": 1000, "told": 200, "score": 190 * DOLLAR}
    cheap = feature("x", "r", "u", "small", **known, dollars=1000, attempts=100)
    dear = feature("x", "r", "v", "large", **known, dollars=10_000, escalated=100)
    assert "large_model" not in kinds(found(cheap, dear))


def test_what_nothing_is_known_of_is_said_to_be_unknown() -> None:
    one = only(found(feature("x", requests=100, dollars=DOLLAR)), "large_model")
    assert one.dollars is None
    assert "is not known" in one.text
    assert "penstock eval" in one.text
    assert "large_model" not in kinds(found(feature("x", requests=100, dollars=DOLLAR, told=1)))


def test_no_prefix_hits() -> None:
    long = {"requests": 100, "input_tokens": 200_000, "dollars": DOLLAR, "told": 1}
    one = only(found(feature("rag", **long, cached_tokens=100)), "no_prefix_hits")
    assert (one.subject, one.dollars) == ("feature rag", DOLLAR)
    assert "before the static" in one.text
    assert "At most $1.00 is spent" in one.text
    assert kinds(found(feature("rag", **long, cached_tokens=150_000))) == set()
    assert kinds(found(feature("rag", **{**long, "input_tokens": 20_000}))) == set()
    assert kinds(found(feature("rag", **{**long, "requests": 20}))) == set()


def test_unbounded_untagged_and_unused() -> None:
    rows = feature("x", "r", "u", "m", "gpu", 131_072, requests=100, uncapped=7, uncapped_dollars=5, told=1)
    keys = {("key_1", "ci"): sums(requests=3, dollars=2), ("", "shadow"): sums(requests=3, dollars=2)}
    some = found(rows, untagged=keys)
    assert kinds(some) == {"unbounded", "untagged", "unused_context"}
    assert only(some, "unbounded").dollars == 5
    assert "routes.r.max_tokens" in only(some, "unbounded").text
    assert only(some, "untagged").subject == "key ci"
    assert "4,096" in only(some, "unused_context").text
    used = feature("x", "r", "u", "m", "gpu", 131_072, requests=100, over_2k=9, over_8k=1, over_32k=1, told=1)
    assert kinds(found(used)) == set()
    rather = feature("x", "r", "u", "m", "gpu", 131_072, requests=100, over_2k=9, told=1)
    assert "16,384" in only(found(rather), "unused_context").text


def test_half_of_a_context_that_nobody_needs() -> None:
    some = {"requests": 100, "over_2k": 9, "over_8k": 1, "told": 1}
    one = only(found(feature("x", "r", "u", "m", "gpu", 131_072, **some)), "unused_context")
    assert "65,536" in one.text
    assert kinds(found(feature("x", "r", "u", "m", "gpu", 65_536, **some))) == set()


def test_attempts_are_no_requests_of_their_own() -> None:
    rows = feature("x", "r", "u", "m", "gpu", requests=5, attempts=2, uncapped=3, uncapped_dollars=5, told=1)
    keys = {("key_1", "ci"): sums(requests=5, attempts=2, dollars=2)}
    some = found(rows, pools=(use(170 * DOLLAR, DOLLAR),), untagged=keys, days=1.0)
    assert "by 5 requests a day" in only(some, "idle_devices").text  # the pool was asked so often
    assert "3 of 3 requests" in only(some, "unbounded").text
    assert "made 3 requests" in only(some, "untagged").text


def test_a_feature_for_each_user() -> None:
    assert kinds(found(*(feature(f"user-{n}", requests=2, told=1) for n in range(1000)))) == set()
    users = [feature(f"user-{n}", requests=2, told=1) for n in range(1001)]
    assert kinds(found(*users)) == {"many_features"}
    assert kinds(found(*(feature(f"user-{n}", requests=20, told=1) for n in range(1001)))) == set()


def told(hosted: int, cloud: int, idle: int | None, compared: int = 100, days: float = 10.0) -> list[str]:
    groups = {
        ("gpu",): sums(
            requests=100, dollars=hosted, device_seconds=50, compared=compared, compared_dollars=hosted,
            compared_device_seconds=50, comparator_dollars=cloud,
        )
    }  # fmt: skip
    paid = None if idle is None else hosted + idle
    pool = PoolUse(pool="gpu", day=None, paid=paid, charged=hosted, device_seconds=50)
    return list(verdicts(build([], groups, [pool], span=[pool], names=MEASURES), days))


def test_it_is_said_plainly_when_self_hosting_loses() -> None:
    first, second = told(DOLLAR, 5 * DOLLAR, 99 * DOLLAR)
    assert first == (
        "Self-hosting loses: it cost $100.00 with its idle time, and the cloud takes $5.00 for the same "
        "tokens; "
        "that is 10 requests a day."
    )
    assert second == (
        "It breaks even at a utilization of 20.0 %; it was 1.0 %. That is 200 requests a day like these."
    )


def test_it_is_said_when_it_pays_or_cannot_or_nobody_knows() -> None:
    assert told(DOLLAR, 5 * DOLLAR, DOLLAR)[0].startswith("Self-hosting pays: it cost $2.00")
    assert "60.0 % less" in told(DOLLAR, 5 * DOLLAR, DOLLAR)[0]
    assert "2 times" in told(10 * DOLLAR, 5 * DOLLAR, 0)[1]
    assert "is not known" in told(DOLLAR, 0, 0, compared=0)[0]
    assert list(verdicts(build([], {}, [], names=MEASURES), 1.0)) == []


def test_without_the_idle_of_a_pool_there_is_no_verdict() -> None:
    [only] = told(3 * DOLLAR, 5 * DOLLAR, None)
    assert only.startswith("Whether self-hosting pays is not known")
    assert "the idle of gpu is missing" in only


def test_a_span_of_less_than_a_day_is_not_made_a_day() -> None:
    first, second = told(DOLLAR, 5 * DOLLAR, 99 * DOLLAR, days=80 / 86_400)
    assert first.endswith("that is 100 requests in 80 seconds.")
    assert second.endswith("That is 2,000 requests like these in 80 seconds.")
    rows = feature("x", "r", "u", "m", "gpu", requests=7)
    one = only(found(rows, pools=(use(170 * DOLLAR, DOLLAR),), days=0.5), "idle_devices")
    assert "by 7 requests in 12 hours" in one.text


def test_the_intervals_are_those_of_the_literature() -> None:
    """Newcombe 1998, table II, (a) of method 10: 56/70 - 48/80; and of one share, table I: 81/263."""
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert round(worst_difference(56 / 70, 70, 48 / 80, 80), 4) == 0.0524
