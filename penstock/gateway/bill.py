"""What a request is charged: the row's last figures, and the amounts that the meter counts.

told       the upstream's usage                                          settled
together   what several engines did of one answer                        settled, or estimated
not told   a stream's events, and the prompt's bytes; the station's time estimated
unknown    asked, and gone before anything came back                     unsettled, at its reservation
nothing    refused, or nobody answered                                   settled, at zero
late       the engine's final bill, after the row was written            settled
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from penstock.spec.model import Price

from .policy.amounts import NANO, Amounts
from .policy.price import Pace, TokenPrice, Used, by_device, by_tokens
from .policy.routes import Place, Way
from .records import Asked, Rate, Row, Told
from .relay import Exchange
from .stations import Station
from .usage import Tally

_BYTES_PER_TOKEN = 4
"""Of prompts, where nobody has counted."""


@dataclass(slots=True)
class Part:
    """What one engine did of an answer that another one went on with."""

    station: Station
    asked: Asked
    tally: Tally
    """As far as it has said, or its bill does."""
    tokens: int
    """That the client got of it."""
    shared: float = 0.0
    """Seconds of the station that processor sharing gives the request."""

    @property
    def owed(self) -> Asked:
        """Who may still send its bill, with what is charged until then."""
        return replace(self.asked, part=round(self.shared * NANO) * self.asked.devices)


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
    if place is None or not exchange.asked or exchange.refused or is_nothing(row, exchange):
        row.settlement = "settled"
        return Amounts()
    if not tally.told and not tally.events:
        if exchange.status == 200 and row.end == "done":
            tally.input = -(-prompt_bytes // _BYTES_PER_TOKEN)
        else:
            row.settlement = "unsettled"
            row.pool, row.device, row.dollars = place.pool, place.device, reserved.dollars
            row.device_seconds = reserved.device_seconds if place.on_devices else None
            return reserved
    elif not tally.final or not tally.told:
        tally.input = tally.input or -(-prompt_bytes // _BYTES_PER_TOKEN)
        tally.output = max(tally.output, tally.events)
    complete = tally.told and tally.final
    row.settlement = "settled" if complete else "estimated"
    return _charge(row, place, way.comparator, tally, shared)


def wasted(row: Row, asked: Asked, exchange: Exchange, prompt_bytes: int) -> None:
    """An attempt at a cloud has come to nothing, which takes its tokens' price all the same: note it in the
    row. Where nobody told the tokens they are reckoned: of a stream by its events, and of what had not begun
    the prompt alone, which is the least that it can be. An answer that is an error (HTTP 400 and more) costs
    nothing, and device time of ours is noted elsewhere."""
    if asked.price is None or asked.on_devices or not exchange.asked or exchange.status >= 400:
        return
    tally = exchange.tally
    complete = tally.told and tally.final
    used = Used(tally.input, tally.output, tally.cached)
    if not complete:
        prompt = tally.input or -(-prompt_bytes // _BYTES_PER_TOKEN)
        used = Used(prompt, max(tally.output, tally.events), tally.cached)
    dollars = by_tokens(asked.price, used)
    row.lost_dollars += dollars
    row.lost_estimated_dollars += 0 if complete else dollars


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
    return _charge(row, place, way.comparator, tally, shared)


def note(way: Way, place: Place, replica: str, bill: str, after: str, behind: int = 0) -> Asked:
    """Who is asked, with all that a bill which comes late is priced by.

    Args:
        bill: what the engine calls it; empty where it sends no bills.
        after: the place in its feed behind which that bill will be, if known.
        behind: tokens of the answer that the client has had.
    """
    return Asked(
        replica=replica,
        upstream=place.name,
        model=place.model,
        pool=place.pool,
        device=place.device,
        devices=place.devices,
        device_price=place.device_price,
        price=_rate(place.price),
        comparator=_rate(way.comparator),
        bill=bill,
        after=after,
        behind=behind,
    )


def late(row: Row, asked: Asked, tally: Tally) -> Amounts | None:
    """A bill has come after its row was written. Returns what is counted instead; None where that stays,
    because the attempt failed (its device time is noted and charged to nobody), or the row has this bill.

    Args:
        tally: what the bill says; nothing at all where the engine never worked for it.
    """
    if asked not in row.owed:
        return None
    if not asked.lost and _is_joint(row):
        told = Told(tally.device_seconds or 0, tally.input, tally.output, tally.cached)
        return _jointly(row, asked, told)
    row.owed = tuple(each for each in row.owed if each != asked)
    if asked.lost:
        row.lost_device_seconds += (tally.device_seconds or 0) * asked.devices
        if asked.price is not None and not asked.on_devices:
            row.lost_dollars += by_tokens(asked.price, Used(tally.input, tally.output, tally.cached))
        return None
    if asked.part is not None:  # the client's tokens stay, and the other engines' time
        others = ((row.device_seconds or 0) - asked.part) // asked.devices
        seconds = others + (tally.device_seconds or 0)
        tally = Tally(row.input_tokens, row.output_tokens, row.cached_tokens, seconds)
    used = _charge(row, asked, asked.comparator, tally, 0.0)
    waits = asked.rough or any(each.part is not None for each in row.owed)
    row.settlement, row.device_seconds_estimated = "estimated" if waits else "settled", waits
    return used


def give_up(row: Row, asked: Asked) -> Amounts | None:
    """A bill will never come: what the row says stays, and None is returned. Unless it has waited for nothing
    else to be settled by those of other engines: then, what that is charged."""
    if not asked.lost and _is_joint(row):
        return _jointly(row, asked, Told())
    row.owed = tuple(
        replace(each, rough=True) if asked.part is not None and each.part is not None else each
        for each in row.owed
        if each != asked
    )
    return None


def _is_joint(row: Row) -> bool:
    """Whether its worker was killed when several engines had made the answer."""
    return any(each.gave is not None for each in row.owed)


def _jointly(row: Row, asked: Asked, told: Told) -> Amounts | None:
    """One of the engines that made a killed worker's answer has said what it did. Once all have, the row is
    as _settle_together would have had it: each token once, of one prompt, and the time of all.

    The time of an engine that can no longer say it is reckoned as that of the others, per token that was read
    or written; where none can, the row stays at its reservation.
    """
    row.owed = tuple(replace(each, told=told) if each == asked else each for each in row.owed)
    parts = [(each, each.told) for each in row.owed if not each.lost]
    if any(said is None for _, said in parts):
        return None
    row.owed = tuple(each for each in row.owed if each.lost)
    known = [(each, said) for each, said in parts if said is not None and said.seconds is not None]
    first = next((said for _, said in known if said.input), Told())
    work = sum(first.input + _output(each, said) for each, said in known)
    if not work:
        return None
    output = sum(_output(each, said) for each, said in parts)
    seconds = sum(said.seconds or 0 for _, said in known)
    missing = len(parts) - len(known)
    seconds += seconds * (len(parts) * first.input + output - work) // work
    last = parts[-1][0]
    tally = Tally(first.input, output, first.cached, seconds)
    used = _charge(row, last, last.comparator, tally, 0.0)
    row.settlement, row.device_seconds_estimated = "estimated" if missing else "settled", bool(missing)
    return used


def _output(asked: Asked, told: Told | None) -> int:
    """Tokens of an answer that came of one attempt: as the client got them, else as the engine says."""
    return asked.gave if asked.gave is not None else 0 if told is None else told.output


def is_nothing(row: Row, exchange: Exchange) -> bool:
    """Whether every upstream failed before there was an answer."""
    return row.end == "upstream_failed" and not exchange.begun


def _rate(price: Price | None) -> Rate | None:
    return None if price is None else Rate(price.input, price.output, price.cached_input, price.per)


def _charge(
    row: Row, place: Place | Asked, comparator: TokenPrice | None, tally: Tally, shared: float
) -> Amounts:
    used = Used(tally.input, tally.output, tally.cached)
    row.input_tokens, row.output_tokens, row.cached_tokens = tally.input, tally.output, tally.cached
    if place.on_devices:
        row.pool, row.device = place.pool, place.device
        told = tally.device_seconds
        row.device_seconds = (round(shared * NANO) if told is None else told) * place.devices
        row.device_seconds_estimated = told is None
    if place.price is not None:
        row.dollars = by_tokens(place.price, used)
    elif place.device_price is not None and row.device_seconds is not None:
        row.dollars = by_device(place.device_price, row.device_seconds)
    if comparator is not None:
        row.comparator_dollars = by_tokens(comparator, used)
    return Amounts(
        tokens=tally.input + tally.output,
        dollars=row.dollars or 0,
        device_seconds=row.device_seconds or 0,
    )
