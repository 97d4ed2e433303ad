"""What a batch is charged: what was agreed when it was sent, and what it has used in the end.

    worst     tokens of all lines, at the price of batches, or by the model's pace on devices of ours
    charge    tokens that the upstream says, at the price that held when the batch was sent

Device time that an upstream does not tell is reckoned by the pace of the model, and the row is marked.
"""

from __future__ import annotations

import msgspec

from penstock.gateway.policy.amounts import Amounts
from penstock.gateway.policy.price import Pace, Used, by_device, by_tokens, of_batches
from penstock.gateway.policy.routes import Place
from penstock.gateway.records import Rate, Row
from penstock.gateway.usage import Tally
from penstock.spec.model import Price


class Terms(msgspec.Struct, kw_only=True):
    """What stands with a batch until it is settled."""

    worker: str
    number: int
    """Where its row is."""
    request_id: str
    """Of its row, by which its upstream can be asked for it."""
    input: str
    """The upstream's id of its input."""
    rate: Rate | None = None
    comparator: Rate | None = None
    device: str = ""
    devices: int = 1
    device_price: int | None = None
    place: str = ""
    """Whose pace its device time is reckoned by."""


def rate(price: Price | None) -> Rate | None:
    """What batches pay."""
    if price is None:
        return None
    price = of_batches(price)
    return Rate(price.input, price.output, price.cached_input, price.per)


def worst(place: Place, used: Used, pace: Pace) -> Amounts:
    """The most that a batch may use."""
    tokens, amount = used.input + used.output, 0
    device = pace.worst(tokens) if place.on_devices else 0
    if (paid := rate(place.price)) is not None:
        amount = by_tokens(paid, used)
    elif place.device_price is not None:
        amount = by_device(place.device_price, device)
    return Amounts(tokens=tokens, dollars=amount, device_seconds=device)


def charge(terms: Terms, row: Row, tally: Tally, pace: Pace | None, *, sure: bool) -> Amounts:
    """Fill in a row's last figures; returns what is counted.

    Args:
        pace: of the model lately; None where nothing is known.
        sure: whether the upstream has told all of it.
    """
    used = Used(tally.input, tally.output, tally.cached)
    tokens = used.input + used.output
    row.input_tokens, row.output_tokens, row.cached_tokens = used.input, used.output, used.cached
    row.dollars = row.comparator_dollars = row.device_seconds = None
    if terms.device:
        told = tally.device_seconds
        row.device = terms.device
        row.device_seconds = (told or 0) * terms.devices
        if told is None and tokens:
            paced = None if pace is None or pace.largest is None else pace.largest * tokens
            reserved = row.reserved_device_seconds
            row.device_seconds = reserved if paced is None else min(paced, reserved)
            row.device_seconds_estimated, sure = True, False
    if terms.rate is not None:
        row.dollars = by_tokens(terms.rate, used)
    elif terms.device_price is not None and row.device_seconds is not None:
        row.dollars = by_device(terms.device_price, row.device_seconds)
    if terms.comparator is not None:
        row.comparator_dollars = by_tokens(terms.comparator, used)
    row.settlement = "settled" if sure else "estimated"
    return Amounts(tokens=tokens, dollars=row.dollars or 0, device_seconds=row.device_seconds or 0)
