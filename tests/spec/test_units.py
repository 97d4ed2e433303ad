"""Quantities as people write them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.spec.units import NANO, nanodollars, seconds, size


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (90, 90),
        ("90", 90),
        ("500ms", 0.5),
        ("1.5m", 90),
        ("2 h", 7200),
        (" 1d ", 86_400),
        (0.25, 0.25),
        (".5s", 0.5),
    ],
)
def test_durations(written: object, expected: float) -> None:
    assert seconds(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        "5 weeks",
        "-1s",
        "1e3s",
        "٣s",
        "s",
        True,
        None,
        [],
        "1" * 50,
        1e300,
        float("inf"),
        float("nan"),
        "9e9d",
    ],
)
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(ValueError):
        seconds(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("80GB", 80 * 10**9),
        ("40 GiB", 40 << 30),
        ("1.5KiB", 1536),
        ("2kB", 2000),
    ],
)
def test_sizes(written: object, expected: int) -> None:
    assert size(written) == expected


@pytest.mark.parametrize("written", ["", "80 gb", 1.5, True, None, "9" * 50, 1 << 70, "9000000000GiB"])
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(ValueError):
        size(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (12.5, 12_500_000_000),
        ("$12.50", 12_500_000_000),
        ("$ 1", NANO),
        (0.1, 100_000_000),
        ("1e-9", 1),
        (0, 0),
    ],
)
def test_money(written: object, expected: int) -> None:
    assert nanodollars(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        "12,50",
        "€5",
        "1e-10",
        1e-10,
        "nan",
        "inf",
        "-inf",
        "1e10",
        "1e999999999",
        "1e-999999999",
        10**30,
        True,
        None,
    ],
)
def test_what_is_no_money(written: object) -> None:
    with pytest.raises(ValueError):
        nanodollars(written)


@given(st.decimals(min_value=0, max_value=10**9, places=9))
def test_money_is_exact(amount: Decimal) -> None:
    assert nanodollars(str(amount)) == amount * NANO
    assert nanodollars(f"${amount}") == amount * NANO
