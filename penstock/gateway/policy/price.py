"""What a request costs, and what it may cost at most. Integers, rounded to the nearest nanodollar, half up.

by tokens    (input - cached) * input + cached * cached_input + output * output, each for `per` tokens
batches      the same, times what they pay of it
by device    price of a device and hour / 3600 s * device-seconds
comparator   by the tokens of the same request, at a cloud's price
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from penstock.spec.model import Price

from .amounts import NANO

_HOUR = 3600 * NANO
"""Nanoseconds."""


class TokenPrice(Protocol):
    """spec.model.Price, or what was noted of one."""

    @property
    def input(self) -> int:
        """Nanodollars for `per` tokens, as all of them."""
        ...

    @property
    def output(self) -> int: ...
    @property
    def cached_input(self) -> int | None: ...
    @property
    def per(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Used:
    """Tokens of one request."""

    input: int = 0
    output: int = 0
    cached: int = 0
    """Of the input, read from a cache."""


def by_tokens(price: TokenPrice, used: Used) -> int:
    """Nanodollars for tokens."""
    cached = min(used.cached, used.input)
    cached_price = price.input if price.cached_input is None else price.cached_input
    amount = (used.input - cached) * price.input + cached * cached_price + used.output * price.output
    return (2 * amount + price.per) // (2 * price.per)


def of_batches(price: Price) -> Price:
    """The price that batches pay: whole numbers still, for more tokens."""
    if price.batch is None:
        return price
    share = Fraction(str(price.batch))
    cached = price.input if price.cached_input is None else price.cached_input
    amounts = {"input": price.input, "output": price.output, "cached_input": cached}
    changed = {name: amount * share.numerator for name, amount in amounts.items()}
    return price.model_copy(update={**changed, "per": price.per * share.denominator, "batch": None})


def by_device(price_per_hour: int, device_nanoseconds: int) -> int:
    """Nanodollars for device time (nanoseconds times devices)."""
    return (2 * price_per_hour * device_nanoseconds + _HOUR) // (2 * _HOUR)


@dataclass(slots=True)
class Pace:
    """How much device time a model has taken for a token lately: what a reservation of device time rests on.

    It is the largest that was seen, forgotten slowly (by 1/64 of the distance with each request that was
    faster), times two. Before anything was seen it is `first`.
    """

    first: int = 50_000_000
    """Nanoseconds times devices of a token, while nothing is known."""
    largest: int | None = None

    def seen(self, tokens: int, device_nanoseconds: int) -> None:
        """Take in a request of `tokens`, in and out together."""
        if tokens <= 0 or device_nanoseconds < 0:
            return
        pace = -(-device_nanoseconds // tokens)
        old = self.largest
        self.largest = pace if old is None or pace >= old else old - (old - pace) // 64

    def worst(self, tokens: int) -> int:
        """Nanoseconds times devices for so many tokens, at most as far as one can tell."""
        return tokens * (self.first if self.largest is None else 2 * self.largest)


@dataclass(slots=True)
class Share:
    """Device time of an engine that does not tell it, divided among the requests that it has at a time.

    While n requests are under way, each is charged 1/n of the time that passes (processor sharing), so that
    all shares together are the time in which there was a request. `virtual` is what one request that had been
    there from the beginning would have been charged.
    """

    running: int = 0
    virtual: float = 0.0
    """Seconds."""
    at: float = 0.0

    def begin(self, now: float) -> float:
        """A request begins; what it gets is handed to `end`. `now` in seconds."""
        self._advance(now)
        self.running += 1
        return self.virtual

    def end(self, begun: float, now: float) -> float:
        """It has ended: its seconds."""
        self._advance(now)
        self.running -= 1
        return self.virtual - begun

    def peek(self, begun: float, now: float) -> float:
        """What it would get if it ended now."""
        self._advance(now)
        return self.virtual - begun

    def _advance(self, now: float) -> None:
        if self.running:
            self.virtual += max(0.0, now - self.at) / self.running
        self.at = max(self.at, now)
