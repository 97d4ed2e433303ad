"""The table of paid hours, and what of them was idle (policy/idle.py has the rules).

claim   a gateway extends its own rows: pool, worker, begin ─▶ until
idle    paid hours of each pool - Σ of its rows' device time, failed attempts included
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from penstock.gateway.policy.amounts import NANO
from penstock.gateway.policy.idle import HOUR, Spell, Terms, paid, prices, together

from .rollups import read
from .schema import MEASURES
from .schema import paid as table
from .store import Store

BRIDGE = 600 * NANO
"""Nanoseconds without a gateway that are paid for all the same: it was started again, as after a crash."""


def claim(
    store: Store, worker: str, pools: Mapping[str, Terms], begun: Mapping[str, int], now: int
) -> dict[str, int]:
    """A gateway says that these pools are paid for, until now (Unix nanoseconds). Raises StoreDown.

    Args:
        begun: when its claims began; one that is not there begins now, or where another gateway has ended
            not long ago.

    Returns when they began, for the next time.
    """
    begins = dict(begun)
    with store.writing() as connection:
        for pool, terms in sorted(pools.items()):
            if pool not in begins:
                last = sa.select(sa.func.max(table.c.until)).where(
                    table.c.pool == pool, table.c.until.between(now - BRIDGE, now)
                )
                begins[pool] = connection.execute(last).scalar_one() or now
            statement = store.insert(table).values(
                pool=pool,
                worker=worker,
                begin=begins[pool],
                until=now,
                device=terms.device,
                devices=terms.devices,
                taken=terms.taken,
                price_per_hour=terms.price,
            )
            later = sa.case(
                (statement.excluded.until > table.c.until, statement.excluded.until), else_=table.c.until
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["pool", "worker", "begin"], set_={"until": later}
                )
            )
    return begins


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """What became of a pool's paid hours in a span. Device time is nanoseconds times devices; money is
    nanodollars per hour times these, so that sums are exact."""

    pool: str
    device: str
    paid: int
    used: int
    paid_money: int | None
    used_money: int | None
    unsettled: int
    """Rows of which nobody knows what they used: not in `used`."""
    unsettled_reserved: int
    """What they had reserved."""
    shared: Terms | None
    """Where engines take more devices than there are: each counts the whole time of one that it shares."""

    @property
    def idle(self) -> int:
        """What was paid for and not used; negative where engines share a device, or outside of paid hours."""
        return self.paid - self.used

    @property
    def idle_money(self) -> int | None:
        """The same in money."""
        return (
            None if self.paid_money is None or self.used_money is None else self.paid_money - self.used_money
        )

    def record(self) -> dict[str, Any]:
        """Under the names of exports: device-hours, dollars, and shares; what has no price has no dollars."""
        return {
            "pool": self.pool,
            "device": self.device,
            "paid_hours": Decimal(self.paid) / HOUR,
            "used_hours": Decimal(self.used) / HOUR,
            "idle_hours": Decimal(self.idle) / HOUR,
            "utilization": Decimal(self.used) / self.paid if self.paid else None,
            "paid_dollars": _dollars(self.paid_money),
            "used_dollars": _dollars(self.used_money),
            "idle_dollars": _dollars(self.idle_money),
            "unsettled_rows": self.unsettled,
            "unsettled_hours": Decimal(self.unsettled_reserved) / HOUR,
        }


def idle(
    store: Store, since: int | None = None, until: int | None = None, pool: str | None = None
) -> list[PoolUse]:
    """Each pool that was paid for or used in [since, until) (Unix nanoseconds), or one, by name."""
    with store.reading() as connection:
        said = claims(connection, pool)
        only = {} if pool is None else {"pool": pool}
        used = {name for (name,) in read(connection, ("pool",), since, until, only) if name}
        found = []
        for name in sorted(said.keys() | used):
            spells = said.get(name, [])
            time, money = paid(spells, since, until)
            if time or name in used:
                found.append(_use(connection, name, spells, time, money, since, until))
    return found


def claims(connection: sa.Connection, pool: str | None = None) -> dict[str, list[Spell]]:
    """When each pool, or one, was paid for, and at which price: spells that do not overlap."""
    query = sa.select(table).order_by(table.c.pool)
    if pool is not None:
        query = query.where(table.c.pool == pool)
    said: dict[str, list[Spell]] = {}
    for row in connection.execute(query):
        terms = Terms(row.devices, row.price_per_hour, row.taken, row.device)
        said.setdefault(row.pool, []).append(Spell(row.begin, row.until, terms))
    return {name: together(each) for name, each in said.items()}


def remarks(use: PoolUse) -> Iterator[str]:
    """What has to be known to read the figures, a line each."""
    about = f"pool {use.pool}"
    if use.shared is not None:
        devices, taken = use.shared.devices, use.shared.taken
        yield (
            f"{about}: engines that take {taken} devices share {devices}, and each counts the whole time of "
            f"one that it shares: more may be used than is paid for. With count: {taken}, and the price of "
            "one such share, the figures add up."
        )
    elif use.used > use.paid:
        yield (
            f"{about}: more was used than was paid for: its devices are more than `count` says, or were used "
            "while no gateway ran that has it in its spec."
        )
    if use.unsettled:
        yield (
            f"{about}: unsettled rows are not in it: {use.unsettled}, which used at most the "
            f"{use.unsettled_reserved / HOUR:.6g} device-hours that they had reserved."
        )


def _use(
    connection: sa.Connection,
    pool: str,
    spells: list[Spell],
    time: int,
    money: int | None,
    since: int | None,
    until: int | None,
) -> PoolUse:
    used = unsettled = reserved = 0
    used_money: int | None = 0
    for begin, end, price in prices(spells, since, until):
        found = read(connection, ("pool",), begin, end, {"pool": pool}).get((pool,))
        sums = dict(zip(MEASURES, found, strict=True)) if found else dict.fromkeys(MEASURES, 0)
        part = sums["device_seconds"] + sums["lost_device_seconds"]
        used, unsettled = used + part, unsettled + sums["unsettled"]
        reserved += sums["unsettled_device_seconds"]
        if price is not None and used_money is not None:
            used_money += part * price
        elif part:
            used_money = None
    within = [
        each.terms
        for each in spells
        if (until is None or each.begin < until) and (since is None or each.until > since)
    ]
    shared = [terms for terms in within if terms.taken > terms.devices]
    return PoolUse(
        pool=pool,
        device=within[-1].device if within else "",
        paid=time,
        used=used,
        paid_money=money,
        used_money=used_money if money is not None else None,
        unsettled=unsettled,
        unsettled_reserved=reserved,
        shared=shared[-1] if shared else None,
    )


def _dollars(money: int | None) -> Decimal | None:
    return None if money is None else Decimal(money) / HOUR / NANO
