"""Whom a request may ask: replicas that are well and were not asked, in the order of its places.

    places ─▶ stations ─┬─ none, of a model of ours: it is woken, and waited for
                        └─ several: the session's, the one that has the prompt's beginning, the least busy

Which of several is decided in `policy/affinity.py`; what is asked of them, by the request.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from penstock.core.errors import PenstockError, Unavailable, brief

from .policy.affinity import choose, prefix_hashes
from .policy.routes import Place
from .relay import Failed
from .stations import NoReplica, Station

if TYPE_CHECKING:
    from .request import Request

_HEARD = 0.05
"""Seconds in which the process that has the engines has told a worker what it does with them."""


class Candidates:
    """Of one request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._hashes: tuple[bytes, ...] | None = None

    async def next(
        self, places: tuple[Place, ...], tried: set[str], used: contextlib.ExitStack
    ) -> tuple[Place, Station] | None:
        """Whom to ask: a replica that is well and was not asked, in the order of places; else any that there
        is. Waits for a model that is starting."""
        request = self._request
        for again in (False, True):
            for place in places:
                stations = list(request.door.stations.of(place))
                if request.previous is not None:
                    stations = [each for each in stations if each is request.previous[2]]
                elif not stations and not again and place.local:
                    stations = await self._woken(place, used)
                fresh = [each for each in stations if again or each.id not in tried]
                if (index := self._choose(place, fresh, panic=again)) is not None:
                    return place, fresh[index]
        return None

    async def has_left(self, place: Place, station: Station, failed: Failed) -> bool:
        """Whether a model of ours has fallen asleep just as it was to be asked: it is woken then, and that is
        none of the route's `retries`."""
        if not place.local or not (failed.attempt.fault == "connect" or failed.attempt.status == 503):
            return False
        await asyncio.sleep(_HEARD)
        return station not in self._request.door.stations.of(place)

    def unserved(self) -> PenstockError:
        """What to say where nobody is left to be asked."""
        request = self._request
        request.notes.append("no replica")
        if any(request.door.stations.of(place) for place in request.places):
            return NoReplica(
                f"All replicas of {request.way.name} have as many requests as they may.", retry_after=1
            )
        return NoReplica(f"Nobody serves {request.way.name} now.", retry_after=5)

    def _choose(self, place: Place, stations: list[Station], *, panic: bool) -> int | None:
        """Which of them; none of those that are not well, but in a panic."""
        if not stations:
            return None
        request, door = self._request, self._request.door
        now = door.monotonic()
        several = len(stations) > 1
        hashes = self._prefix() if several else ()
        candidates = [station.candidate(hashes, now) for station in stations]
        if not panic and all(each.weight <= 0 for each in candidates):
            return None
        sticky = request.way.route.sticky
        session = request.caller.headers.get(sticky.lower()) if sticky and several else None
        index = choose(candidates, door.draw() if several else 0.0, session)
        if index is not None and hashes:
            stations[index].prefixes.add(hashes)
        return index

    def _prefix(self) -> tuple[bytes, ...]:
        if self._hashes is None:
            self._hashes = prefix_hashes(self._request.envelope.prompt, self._request.salt.encode())
        return self._hashes

    async def _woken(self, place: Place, used: contextlib.ExitStack) -> list[Station]:
        """Replicas of a model of ours, once it is there; none if it does not come."""
        request = self._request
        fleet, route = request.door.fleet, request.way.route
        if fleet is None or not fleet.replicas(place.name):
            return []
        used.enter_context(fleet.use(place.name))
        try:
            await fleet.ready(place.name, timeout=route.wait, max_waiting=route.max_waiting)
        except Unavailable as error:
            if place is request.places[-1]:
                raise
            request.notes.append(f"{place.name}: {brief(str(error), 80)}")
            return []
        return list(request.door.stations.of(place))
