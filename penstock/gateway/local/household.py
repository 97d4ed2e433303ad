"""The gateway and the engines behind it as one Worker of `http.serve`: they drain in this order."""

from __future__ import annotations

from penstock.core.errors import PenstockError
from penstock.http.serve import Worker

from .fleet import LocalFleet


class Household:
    """Implements Worker."""

    def __init__(self, door: Worker, fleet: LocalFleet) -> None:
        self._door = door
        self._fleet = fleet

    @property
    def failure(self) -> PenstockError | None:
        """The gateway's end, or that of a model which cannot work as the spec has it."""
        return self._door.failure or self._fleet.refusal

    @property
    def load(self) -> int:
        """Requests under way."""
        return self._door.load

    async def drain(self, timeout: float) -> None:
        """Let running requests end, then the engines: they have nothing left to do."""
        await self._door.drain(timeout)
        await self._fleet.close()

    async def close(self) -> None:
        """End both now, and wait until they are gone. Engines that were not drained are killed: whoever
        aborts (a second signal) does not want to wait for them."""
        try:
            await self._door.close()
        finally:
            await self._fleet.close(patient=False)
