"""Amounts as people read them."""

from __future__ import annotations

from fractions import Fraction

_NANO = 10**9
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def money(nanodollars: int) -> str:
    """`$12.34`; what is less than a dollar has three digits that mean something."""
    dollars = nanodollars / _NANO
    size = abs(dollars)
    if size >= 1000:
        text = f"{size:,.0f}"
    elif size >= 1 or size == 0:
        text = f"{size:,.2f}"
    else:
        text = f"{size:.3g}" if size >= 1e-4 else f"{size:.9f}".rstrip("0")
    return f"-${text}" if dollars < 0 else f"${text}"


def percent(share: Fraction | float) -> str:
    """`12.3 %`; small ones have two digits that mean something."""
    value = 100 * float(share)
    if value and abs(value) < 0.1:
        return f"{value:.2g} %"
    return f"{value:.1f} %" if abs(value) < 99.95 or abs(value) != round(abs(value)) else f"{value:.0f} %"


def count(number: float) -> str:
    """`12,345`, `3.2`, `0.05`."""
    if abs(number) >= 100 or number == int(number):
        return f"{number:,.0f}"
    return f"{number:.3g}"


def span(days: float) -> str:
    """A length of time as people say it: 90 days, 5.2 hours, 2 minutes."""
    for unit, per_day in (("days", 1), ("hours", 24), ("minutes", 1440)):
        if days * per_day >= 1.5:
            return f"{days * per_day:.3g} {unit}"
    return f"{days * 86_400:.3g} seconds"


def pace(number: float, days: float) -> str:
    """`1,234 requests a day`; of less than one, which says little of it, `12 requests in 80 seconds`."""
    if days >= 1:
        return f"{count(number / days)} requests a day"
    return f"{count(number)} requests in {span(days)}"


def plain(text: str) -> str:
    """Of what clients wrote: without what a terminal would obey, or a browser turn round."""
    return (
        text if text.isprintable() else "".join(each if each.isprintable() else _UNPRINTABLE for each in text)
    )
