"""What a batch is charged: what was agreed when it was sent, and what it has used in the end.

    worst     tokens of all lines, at the price of batches, or by the model's pace on devices of ours
    charge    tokens that the upstream says, at the price that held when the batch was sent

Device time that an upstream does not tell is reckoned by the pace of the model, and the row is marked.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.gateway.policy.amounts import Amounts
from penstock.gateway.policy.price import Pace, Used, by_device, by_tokens, of_batches
from penstock.gateway.policy.routes import Place
from penstock.gateway.records import Row
from penstock.gateway.usage import Tally
from penstock.spec.model import Price


class Rate(msgspec.Struct):
    """A price of batches, in nanodollars for `per` tokens."""

    input: int
    output: int
    cached: int
    per: int

    @classmethod
    def of(cls, price: Price | None) -> Rate | None:
        """What batches pay."""
        if price is None:
            return None
        price = of_batches(price)
        cached = price.input if price.cached_input is None else price.cached_input
        return cls(price.input, price.output, cached, price.per)

    def dollars(self, used: Used) -> int:
        """Nanodollars."""
        return by_tokens(
            Price.model_construct(
                input=self.input, output=self.output, cached_input=self.cached, per=self.per
            ),
            used,
        )


class Terms(msgspec.Struct, kw_only=True):
    """What stands with a batch until it is settled."""

    worker: str
    number: int
    """Where its row is."""
    row: Row
    """As it was let through."""
    input: str
    """The upstream's id of its input."""
    rate: Rate | None = None
    comparator: Rate | None = None
    device: str = ""
    devices: int = 1
    device_price: int | None = None
    place: str = ""
    """Of its pace."""


def worst(place: Place, used: Used, pace: Pace) -> Amounts:
    """The most that a batch may use."""
    tokens, dollars = used.input + used.output, 0
    device = pace.worst(tokens) if place.on_devices else 0
    rate = Rate.of(place.price)
    if rate is not None:
        dollars = rate.dollars(used)
    elif place.device_price is not None:
        dollars = by_device(place.device_price, device)
    return Amounts(tokens=tokens, dollars=dollars, device_seconds=device)


def charge(terms: Terms, tally: Tally, pace: Pace | None, *, sure: bool) -> tuple[dict[str, Any], Amounts]:
    """The row's last figures, by column, and what is counted.

    Args:
        pace: of the model lately; None where nothing is known.
        sure: whether the upstream has told all of it.
    """
    used = Used(tally.input, tally.output, tally.cached)
    tokens = used.input + used.output
    figures: dict[str, Any] = {
        "input_tokens": used.input,
        "output_tokens": used.output,
        "cached_tokens": used.cached,
        "device": terms.device,
        "device_seconds": None,
        "device_seconds_estimated": False,
        "dollars": None,
        "comparator_dollars": None,
    }
    if terms.device:
        told = tally.device_seconds
        if told is None and tokens:
            paced = None if pace is None or pace.largest is None else pace.largest * tokens
            reserved = terms.row.reserved_device_seconds
            figures["device_seconds"] = reserved if paced is None else min(paced, reserved)
            figures["device_seconds_estimated"], sure = True, False
        else:
            figures["device_seconds"] = (told or 0) * terms.devices
    if terms.rate is not None:
        figures["dollars"] = terms.rate.dollars(used)
    elif terms.device_price is not None and figures["device_seconds"] is not None:
        figures["dollars"] = by_device(terms.device_price, figures["device_seconds"])
    if terms.comparator is not None:
        figures["comparator_dollars"] = terms.comparator.dollars(used)
    figures["settlement"] = "settled" if sure else "estimated"
    amounts = Amounts(
        tokens=tokens,
        dollars=figures["dollars"] or 0,
        device_seconds=figures["device_seconds"] or 0,
    )
    return figures, amounts
