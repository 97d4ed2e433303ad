"""What self-hosting would cost before anything runs, against a cloud's price for the same tokens.

    busy device   $ per token = price of a replica's hour / 3600 / its tokens per second
    utilization   requests per second * tokens of a request / tokens per second of all replicas
    self-hosted   replicas * price of an hour * hours: paid whether they are busy or not
    break-even    utilization at which both cost the same = $ of a busy device / $ of the cloud

Money is nanodollars, exact as fractions; a month is a twelfth of 365.25 days.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

HOURS = Fraction(36525, 100) * 24 / 12
"""Of a month: 730.5."""
DAY = 86_400
RATES = tuple(Fraction(each, DAY) for each in (10, 100, 1000, 10_000)) + tuple(
    map(Fraction, (1, 3, 10, 30, 100))
)
"""Requests per second that the table has."""
SHARES = tuple(Fraction(each, 100) for each in (1, 5, 15, 30, 60, 85, 100))
"""Utilizations that the table has."""
MUCH, SOME = Fraction(7, 10), Fraction(1, 10)


@dataclass(frozen=True, slots=True)
class Dated:
    """Where a price comes from. One without is none."""

    as_of: datetime.date
    source: str

    def __str__(self) -> str:
        return f"{self.source}, {self.as_of.isoformat()}"


@dataclass(frozen=True, slots=True)
class Hosted:
    """A replica: its devices, and how much it does when it is busy all the time."""

    price: int
    """Nanodollars of a device and hour."""
    dated: Dated
    throughput: Fraction
    """Tokens per second, prompt and answer together, at the latency that is wanted: a measurement."""
    devices: int = 1

    @property
    def hour(self) -> int:
        """Nanodollars of a replica and hour."""
        return self.price * self.devices

    @property
    def token(self) -> Fraction:
        """Nanodollars of a token, busy all the time."""
        return Fraction(self.hour, 3600) / self.throughput


@dataclass(frozen=True, slots=True)
class Cloud:
    """A price by tokens, in nanodollars for a million."""

    input: int
    output: int
    dated: Dated
    batch: Fraction | None = None
    """What batches pay of it."""


@dataclass(frozen=True, slots=True)
class Request:
    """Its tokens, on average."""

    input: int
    output: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.input + self.output

    def cost(self, cloud: Cloud) -> Fraction:
        """Nanodollars."""
        return Fraction(self.input * cloud.input + self.output * cloud.output, 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of a table."""

    rate: Fraction
    """Requests per second."""
    replicas: int
    utilization: Fraction
    hosted: Fraction
    """Nanodollars of a month."""
    cloud: Fraction | None

    @property
    def saving(self) -> Fraction | None:
        """Of the cloud's bill; negative where self-hosting costs more."""
        return None if not self.cloud else 1 - self.hosted / self.cloud


def at_rate(hosted: Hosted, cloud: Cloud | None, request: Request, rate: Fraction, most: Fraction) -> Case:
    """So many requests per second, on as many replicas as they take.

    Args:
        most: utilization up to which a replica is planned.
    """
    load = rate * request.tokens / hosted.throughput
    replicas = max(1, math.ceil(load / most))
    return Case(
        rate=rate,
        replicas=replicas,
        utilization=load / replicas,
        hosted=replicas * hosted.hour * HOURS,
        cloud=None if cloud is None else rate * 3600 * HOURS * request.cost(cloud),
    )


def at_utilization(hosted: Hosted, cloud: Cloud | None, request: Request, share: Fraction) -> Case:
    """One replica that is used so much."""
    return at_rate(hosted, cloud, request, share * hosted.throughput / request.tokens, Fraction(1))


def rates(
    hosted: Hosted, cloud: Cloud | None, request: Request, most: Fraction, own: Sequence[Fraction] = ()
) -> Iterator[Case]:
    """The savings table by requests per second, with those of one's own."""
    for rate in sorted({*RATES, *own}):
        yield at_rate(hosted, cloud, request, rate, most)


def break_even(hosted: Hosted, cloud: Cloud, request: Request) -> Fraction:
    """Utilization from which self-hosting is cheaper; over what a replica can reach: never."""
    return hosted.token * request.tokens / request.cost(cloud)


def verdict(saving: Fraction | None) -> str:
    """In words."""
    if saving is None:
        return "no cloud price to compare with"
    if saving >= MUCH:
        return "much cheaper"
    if saving >= SOME:
        return "cheaper"
    if saving > -SOME:
        return "about the same"
    return "negative: depreciation exceeds the API bill"
