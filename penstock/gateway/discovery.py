"""Which replicas an upstream has, where its name has an address for each: a headless Service of Kubernetes.

    every five seconds: name ─▶ addresses ─▶ stations that are new, stations that are gone

A name that cannot be looked up says nothing: those that are known stay, and their probes say how they are.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

from yarl import URL

from .stations import Stations
from .tasks import Repeated

logger = logging.getLogger("penstock.gateway")

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]


async def addresses(host: str, port: int) -> Sequence[str]:
    """All addresses of a name. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class Discovery(Repeated):
    """Looks up every upstream that is discovered."""

    interval = 5.0
    failure = "looking for replicas failed"

    def __init__(self, stations: Stations, forget: Callable[[str], None], lookup: Lookup = addresses) -> None:
        """
        Args:
            forget: is told the id of a replica that is gone.
        """
        super().__init__()
        self._stations = stations
        self._forget = forget
        self._lookup = lookup
        self._silent: set[str] = set()

    async def look(self) -> None:
        """Look up all of them, once."""
        await asyncio.gather(*(self._one(name, URL(url)) for name, url in self._stations.discovered.items()))

    async def _one(self, name: str, url: URL) -> None:
        assert url.host is not None
        assert url.port is not None
        try:
            found = await self._lookup(url.host, url.port)
        except OSError as error:
            if name not in self._silent:  # once, until it is answered again
                self._silent.add(name)
                logger.warning("%s of upstreams.%s cannot be looked up: %s", url.host, name, error)
            return
        self._silent.discard(name)
        new, gone = await self._stations.found(name, found)
        for id in new:
            logger.info("the replica %s is there", id)
        for id in gone:
            logger.info("the replica %s is gone", id)
            self._forget(id)
