"""A worker in a process of its own: requests come and go until it is killed.

It writes a line for each request that was let through, and for its end with what it was charged, after the
meter had been told: what this file says of a request is the least that the ledger must say.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

from penstock.gateway.meter import LimitReached, NotCounted
from penstock.gateway.metering import LedgerMeter
from penstock.gateway.policy.amounts import Amounts, Limit
from penstock.gateway.records import Row
from penstock.spec.model import Ledger

LIMITS = (
    Limit("key:k", "requests", "minute", 100_000),
    Limit("key:k", "tokens", "minute", 1_000_000),
    Limit("team:t", "concurrent", "now", 24),
    Limit("team:t", "dollars", "day", 12_000),
)


async def main(url: str, counters: str, spool: str, log: str, stop: str, seed: int) -> None:
    """Traffic until the end of the process; or, once there is a file `stop`, of the budget."""
    meter = await LedgerMeter.open(Ledger(url=url, spool=spool, counters=counters or None))
    draw = random.Random(seed)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    note = lambda *words: os.write(fd, (" ".join(map(str, words)) + "\n").encode())  # noqa: E731
    refused = 0

    async def one(name: str) -> None:
        nonlocal refused
        worst = Amounts(tokens=draw.randint(1, 50), dollars=draw.randint(1, 20))
        row = Row(id=name, at=1_800_000_000_000_000_000, key_id="k", team="t")
        try:
            reservation = await meter.reserve(row, LIMITS, worst)
        except LimitReached as error:
            refused += error.limit.unit == "dollars"
            await asyncio.sleep(0.002)
            return
        except NotCounted:  # who was killed holds a part of the budget, and has not been found
            await asyncio.sleep(0.002)
            return
        later = Amounts()
        if draw.random() < 0.3:  # as a request that escalates: its first part ends, and the rest goes on
            later = Amounts(tokens=worst.tokens // 2, dollars=worst.dollars // 2)
        note("open", name, worst.dollars, later.dollars)
        await asyncio.sleep(draw.uniform(0, 0.02))
        if later.dollars:
            used = Amounts(tokens=1, dollars=draw.randint(0, worst.dollars - later.dollars))
            first, worst = row, later
            row = Row(id=name, at=first.at, key_id="k", team="t", escalated_from=f"{name}.attempt")
            first.id, first.dollars, first.status, first.end = (
                f"{name}.attempt",
                used.dollars,
                200,
                "escalated",
            )
            reservation = meter.hand_over(reservation, used, row, later)
            note("open", first.id, 0, 0)
            note("end", first.id, used.dollars)
            await asyncio.sleep(draw.uniform(0, 0.02))
        used = Amounts(tokens=worst.tokens // 2, dollars=draw.randint(0, worst.dollars))
        row.dollars, row.status, row.end = used.dollars, 200, "done"
        meter.commit(reservation, used)
        note("end", name, used.dollars)

    note("ready", meter.journal.worker)
    number, parent = 0, os.getppid()
    while refused < 100 and os.getppid() == parent:  # not for ever where the test itself is killed
        ends = Path(stop).exists()
        if not ends:
            refused = 0
        # seed 0 leaves room for the others, until it is to use up what is left
        size = 24 if ends else 2 if seed == 0 else 12
        batch = [one(f"{seed}-{number + each}") for each in range(size)]
        number += len(batch)
        await asyncio.gather(*batch)
    await meter.close()
    note("closed")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:6], int(sys.argv[6])))
