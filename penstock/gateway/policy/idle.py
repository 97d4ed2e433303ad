"""What of the paid hours of a pool was used: idle = paid - used, in integers, over any span of time.

    claims of gateways ──together──▶ spells that do not overlap ──paid──▶ device-time and money of a span
                                          └──prices──▶ what device-time that was used at a moment is worth

At each moment the largest claim holds, so that gateways before the same pool pay for it once. A span is
[since, until); a request belongs to the moment of its arrival, with all that it used: figures of spans that
follow one another add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from .amounts import NANO

HOUR = 3600 * NANO
"""Nanoseconds."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a gateway says of a pool; the larger one is believed."""

    devices: int
    price: int | None
    """Nanodollars of a device and hour."""
    taken: int
    """Devices that its engines take together."""
    device: str = ""
    """Their kind."""

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """By which the larger one is found."""
        return self.devices, -1 if self.price is None else self.price, self.taken, self.device


@dataclass(frozen=True, slots=True)
class Spell:
    """From `begin` until `until` (Unix nanoseconds) a pool was paid for on these terms."""

    begin: int
    until: int
    terms: Terms


def together(claims: Sequence[Spell]) -> list[Spell]:
    """Spells in their order that do not overlap: at each moment the largest claim."""
    edges = sorted(
        [(claim.begin, 1, claim.terms) for claim in claims if claim.begin < claim.until]
        + [(claim.until, -1, claim.terms) for claim in claims if claim.begin < claim.until],
        key=lambda edge: edge[0],
    )
    active: Counter[Terms] = Counter()
    found: list[Spell] = []
    moments = [(at, list(group)) for at, group in groupby(edges, key=lambda edge: edge[0])]
    for (at, group), (then, _) in pairwise(moments):
        for _, change, terms in group:
            active[terms] += change
        active = +active
        if not active:
            continue
        terms = max(active, key=lambda each: each.rank)
        if found and found[-1].until == at and found[-1].terms == terms:
            at = found.pop().begin
        found.append(Spell(at, then, terms))
    return found


def paid(spells: Sequence[Spell], since: int | None, until: int | None) -> tuple[int, int | None]:
    """Of a span: nanoseconds times devices, and nanodollars per hour times these (None without a price)."""
    time, money, priced = 0, 0, True
    for spell in spells:
        begin = spell.begin if since is None else max(spell.begin, since)
        end = spell.until if until is None else min(spell.until, until)
        if begin >= end:
            continue
        part = (end - begin) * spell.terms.devices
        time += part
        priced = priced and spell.terms.price is not None
        money += part * (spell.terms.price or 0)
    return time, money if priced else None


def prices(
    spells: Sequence[Spell], since: int | None, until: int | None
) -> Iterator[tuple[int | None, int | None, int | None]]:
    """A span in parts (begin, end, price) of one price each. Between spells the one before holds, and before
    the first its own."""
    begin = since
    for before, after in pairwise(spells):
        if before.terms.price == after.terms.price or (begin is not None and after.begin <= begin):
            continue
        if until is not None and after.begin >= until:
            break
        yield begin, after.begin, before.terms.price
        begin = after.begin
    yield begin, until, _price_at(spells, begin)


def _price_at(spells: Sequence[Spell], at: int | None) -> int | None:
    if not spells:
        return None
    price = spells[0].terms.price
    for spell in spells:
        if at is None or spell.begin > at:
            break
        price = spell.terms.price
    return price
