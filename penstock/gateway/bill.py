"""What a request is charged: the row's last figures, and the amounts that the meter counts.

told       the upstream's usage                                          settled
together   what several engines did of one answer                        settled, or estimated
not told   a stream's events, and the prompt's bytes; the station's time estimated
unknown    asked, and gone before anything came back                     unsettled, at its reservation
nothing    refused, or nobody answered                                   settled, at zero
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .policy.amounts import NANO, Amounts
from .policy.price import Pace, Used, by_device, by_tokens
from .policy.routes import Place, Way
from .records import Row
from .relay import Exchange
from .stations import Station
from .usage import Tally

_BYTES_PER_TOKEN = 4
"""Of prompts, where nobody has counted."""


@dataclass(slots=True)
class Part:
    """What one engine did of an answer that another one went on with."""

    station: Station
    id: str
    """Of the request, there."""
    tally: Tally
    """As far as it has said, or its bill does."""
    tokens: int
    """That the client got of it."""
    shared: float
    """Seconds of the station that processor sharing gives the request."""


def worst(places: tuple[Place, ...], used: dict[Place, Used], paces: dict[Place, Pace]) -> Amounts:
    """The most that a request may use at any of the places that it can go to."""
    tokens = dollars = device = 0
    for place in places:
        most = used[place]
        total = most.input + most.output
        tokens = max(tokens, total)
        time = paces[place].worst(total) if place.on_devices else 0
        device = max(device, time)
        if place.price is not None:
            dollars = max(dollars, by_tokens(place.price, most))
        elif place.device_price is not None:
            dollars = max(dollars, by_device(place.device_price, time))
    return Amounts(tokens=tokens, dollars=dollars, device_seconds=device)


def settle(
    row: Row,
    way: Way,
    place: Place | None,
    exchange: Exchange,
    *,
    reserved: Amounts,
    prompt_bytes: int,
    shared: float,
    earlier: Sequence[Part] = (),
) -> Amounts:
    """Fill in a row's figures; returns what is counted.

    Args:
        place: that answered, or was asked last; None where nobody was.
        prompt_bytes: length of the request's body.
        shared: seconds of the station that processor sharing gives the request.
        earlier: what other engines did of it, before the last one that was asked.
    """
    tally = exchange.tally
    if earlier and place is not None:
        return _settle_together(row, way, place, exchange, shared, earlier)
    if place is None or not exchange.asked or exchange.refused or _nothing(row, exchange):
        row.settlement = "settled"
        return Amounts()
    if not tally.told and not tally.events:
        if exchange.status == 200 and row.end == "done":
            tally.input = -(-prompt_bytes // _BYTES_PER_TOKEN)
        else:
            row.settlement = "unsettled"
            row.device, row.dollars = place.device, reserved.dollars
            row.device_seconds = reserved.device_seconds if place.on_devices else None
            return reserved
    elif not tally.final or not tally.told:
        tally.input = tally.input or -(-prompt_bytes // _BYTES_PER_TOKEN)
        tally.output = max(tally.output, tally.events)
    complete = tally.told and tally.final
    row.settlement = "settled" if complete else "estimated"
    return _charge(row, way, place, tally, shared)


def _settle_together(
    row: Row, way: Way, place: Place, exchange: Exchange, shared: float, earlier: Sequence[Part]
) -> Amounts:
    """The client got each token once, of one prompt; the engines' times add up."""
    first, last = earlier[0].tally, exchange.tally
    tally = Tally(input=first.input, cached=first.cached, output=sum(part.tokens for part in earlier))
    told = [part.tally.device_seconds for part in earlier]
    seconds = [part.shared for part in earlier]
    if exchange.asked:
        tally.output += last.output if last.final else max(last.output, last.events)
        told.append(last.device_seconds)
        seconds.append(shared)
    if None not in told:
        tally.device_seconds = sum(each or 0 for each in told)
    shared = sum(more if each is None else each / NANO for each, more in zip(told, seconds, strict=True))
    row.settlement = "estimated" if None in told else "settled"
    return _charge(row, way, place, tally, shared)


def _nothing(row: Row, exchange: Exchange) -> bool:
    """Whether every upstream failed before there was an answer."""
    return row.end == "upstream_failed" and not exchange.begun


def _charge(row: Row, way: Way, place: Place, tally: Tally, shared: float) -> Amounts:
    row.input_tokens, row.output_tokens, row.cached_tokens = tally.input, tally.output, tally.cached
    used = Used(tally.input, tally.output, tally.cached)
    if place.on_devices:
        row.device = place.device
        told = tally.device_seconds
        row.device_seconds = (round(shared * NANO) if told is None else told) * place.devices
        row.device_seconds_estimated = told is None
    if place.price is not None:
        row.dollars = by_tokens(place.price, used)
    elif place.device_price is not None and row.device_seconds is not None:
        row.dollars = by_device(place.device_price, row.device_seconds)
    if way.comparator is not None:
        row.comparator_dollars = by_tokens(way.comparator, used)
    return Amounts(
        tokens=tally.input + tally.output,
        dollars=row.dollars or 0,
        device_seconds=row.device_seconds or 0,
    )
