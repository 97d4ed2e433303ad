"""The hours that pools are paid for: while a gateway runs that has them in its spec, the ledger says so.

It knows the spec's pools, and a table that is extended every few seconds. What of it was idle is counted when
somebody asks (ledger/idle.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.core.errors import Unavailable
from penstock.spec.model import Spec

from .ledger.idle import claim
from .metering import LedgerMeter
from .policy.idle import Terms
from .tasks import Repeated

logger = logging.getLogger("penstock.gateway")


def terms(spec: Spec) -> dict[str, Terms]:
    """What is paid for each pool, and how many of its devices the engines before this gateway take."""
    taken = dict.fromkeys(spec.pools, 0)
    for model in spec.models.values():
        taken[model.pool] += model.replicas * model.devices
    for upstream in spec.upstreams.values():
        if upstream.pool is not None:
            taken[upstream.pool] += len(upstream.replicas) * upstream.devices
    return {
        name: Terms(pool.count, pool.price_per_hour, taken[name], pool.hardware)
        for name, pool in spec.pools.items()
    }


class PaidHours(Repeated):
    """Extends the claims of one gateway."""

    interval = 5.0
    failure = "the hours that pools are paid for cannot be written"

    def __init__(self, meter: LedgerMeter, spec: Spec, wall: Callable[[], int]) -> None:
        """`wall`: Unix time in nanoseconds."""
        super().__init__()
        self._meter = meter
        self._terms = terms(spec)
        self._wall = wall
        self._begun: dict[str, int] = {}

    def start(self) -> None:
        """Begin, where there is something to be paid for."""
        if self._terms:
            super().start()

    async def look(self) -> None:
        """Extend them until now. Raises Unavailable; the next time makes up for it."""
        store, worker, now = self._meter.store, self._meter.journal.worker, self._wall()
        begun = dict(self._begun)
        self._begun = await self._meter.thread.call(lambda: claim(store, worker, self._terms, begun, now))

    async def stop(self) -> None:
        """End, with the last seconds."""
        await super().stop()
        if self._begun:
            try:
                await self.look()
            except Unavailable:
                logger.warning("the last %g s of paid hours are not in the ledger", self.interval)
