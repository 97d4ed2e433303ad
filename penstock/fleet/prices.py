"""Dollars of a plan, in whole nanodollars; and when self-hosting is cheaper than a cloud's tokens.

    by hour            price of a device x devices
    by million tokens  dollars of an hour / (tokens of an hour / 10^6)
    break-even         dollars of a request on a replica that is always full / a cloud's price of the request:
                       the share of its capacity from which on a replica is cheaper

Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

_HOUR = 3600
MONTH = Fraction(36525, 100) * 24 / 12
"""Hours: 730.5, as in gateway/costs/estimate.py."""


@dataclass(frozen=True, slots=True)
class Cloud:
    """What a cloud takes; nanodollars for a million tokens."""

    input: int
    output: int
    name: str = "cloud"
    as_of: str = ""
    source: str = ""

    def request(self, prompt: int, output: int) -> int:
        """Nanodollars of one request."""
        return _whole(Fraction(prompt * self.input + output * self.output, 10**6))


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one pool; nanodollars."""

    per_hour: int
    per_month: int
    per_million_tokens: int
    """Input and output together, at the planned rate."""
    per_million_output: int
    per_thousand_requests: int
    full_per_thousand_requests: int
    """The same if it were always as busy as it may be."""


def costs(*, per_hour: int, rate: float, usable: float, prompt: int, output: int) -> Costs:
    """What so many devices cost.

    Args:
        per_hour: nanodollars of all devices.
        rate: requests a second that come.
        usable: requests a second that could come.
    """
    requests = Fraction(rate) * _HOUR
    most = Fraction(usable) * _HOUR
    return Costs(
        per_hour=per_hour,
        per_month=_whole(per_hour * MONTH),
        per_million_tokens=_per(per_hour, requests * (prompt + output), 10**6),
        per_million_output=_per(per_hour, requests * output, 10**6),
        per_thousand_requests=_per(per_hour, requests, 1000),
        full_per_thousand_requests=_per(per_hour, most, 1000),
    )


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Self-hosting against a cloud, for the same tokens."""

    cloud: Cloud
    cloud_per_thousand: int
    utilisation: float
    """Of the capacity, from which on self-hosting is cheaper; over 1: never, on this hardware."""
    rate: float
    """Requests a second there."""
    saving: float
    """Share of the cloud's bill that is saved at the planned rate; negative where it costs more."""


def break_even(
    cloud: Cloud, *, per_hour: int, rate: float, usable: float, prompt: int, output: int
) -> BreakEven:
    """Compare; see the module for the formula."""
    each = cloud.request(prompt, output)
    at = float(Fraction(per_hour, each * _HOUR)) if each else float("inf")
    bill = each * rate * _HOUR
    return BreakEven(
        cloud=cloud,
        cloud_per_thousand=1000 * each,
        utilisation=at / usable if usable else float("inf"),
        rate=at,
        saving=1 - per_hour / bill if bill else float("-inf"),
    )


def _per(dollars: int, count: Fraction, unit: int) -> int:
    return _whole(Fraction(dollars) * unit / count) if count else 0


def _whole(amount: Fraction) -> int:
    """Rounded half up."""
    return (2 * amount.numerator + amount.denominator) // (2 * amount.denominator)
