"""Everybody who can be asked: one station for each replica, with its connections, its health and its load.

    spec.upstreams ──▶ stations, from the start to the end; discovered ones come and go (discovery.py)
    fleet          ──▶ stations of models of ours, as its replicas come and go

It knows URLs and numbers; what is sent and what comes back is `relay`'s matter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
from yarl import URL

from penstock.core.errors import StartupError, Unavailable
from penstock.http.client import Answer, Client
from penstock.spec.model import Spec, Upstream

from .fleet import Fleet, Replica
from .policy.affinity import Candidate, Prefixes
from .policy.health import Health
from .policy.price import Pace, Share
from .policy.routes import Kind, Place

_KEEP_ALIVE = 4.0
"""Seconds that an idle connection is kept: less than Penstock's and vLLM's 5, or a request would now and then
meet a connection that closes."""
_STALE = 10.0
"""Seconds after which a report of an engine's load says nothing any more."""
_ANTHROPIC_VERSION = "2023-06-01"

Clock = Callable[[], float]


class NoReplica(Unavailable):
    """Nobody can take a request now."""

    code = "no_replica"


class Station:
    """One replica, as the gateway sees it."""

    def __init__(
        self,
        id: str,
        url: str,
        kind: Kind,
        *,
        headers: Mapping[str, str],
        trusted: bool = False,
        most: int = 1000,
        timeouts: tuple[float, float, float] = (5.0, 600.0, 60.0),
    ) -> None:
        """
        Args:
            headers: sent with every request, its key among them.
            trusted: that key is one of gateways there: who asks goes along, and bills are read.
            most: requests at a time.
            timeouts: seconds until a connection stands, until the answer begins, and between two pieces.
        """
        self.id = id
        self.url = url
        self.kind: Kind = kind
        self.trusted = trusted
        self.most = most
        self.timeout_connect, self.timeout_headers, self.timeout_idle = timeouts
        self.health = Health()
        self.prefixes = Prefixes()
        self.share = Share()
        self.in_flight = 0
        self.waiting = 0.0
        self.kv_usage = 0.0
        self.reported_at = float("-inf")
        self._headers = dict(headers)
        self._client = Client(url, headers, timeout=self.timeout_connect, keep_alive=_KEEP_ALIVE)
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None

    def report(self, waiting: float, kv_usage: float, now: float) -> None:
        """Take in what its metrics say."""
        self.waiting, self.kv_usage, self.reported_at = waiting, kv_usage, now

    def candidate(self, hashes: Sequence[bytes], now: float) -> Candidate:
        """As the choice among replicas sees it."""
        fresh = now - self.reported_at < _STALE
        return Candidate(
            id=self.id,
            in_flight=self.in_flight,
            most=self.most,
            weight=self.health.weight(now),
            waiting=self.waiting if fresh else 0.0,
            kv_usage=self.kv_usage if fresh else 0.0,
            matched=self.prefixes.match(hashes) if hashes else 0,
        )

    def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """A POST that is relayed, as a context manager; `path` is the gateway's own word."""
        return self._client.request("POST", path, body, headers)

    def request(self, method: str, path: str, *, once: bool = False, **options: Any) -> Any:
        """aiohttp's context manager of one exchange, for what is not asked for by the thousand.

        Args:
            path: the gateway's own word; nothing of it comes from a client unchecked.
            once: it is not asked for again, and need not be remembered.
        """
        url = self._urls.get(path)
        if url is None:
            url = URL(self.url + path, encoded=True)
            if not once:
                self._urls[path] = url
        return self.session.request(method, url, allow_redirects=False, **options)

    @property
    def session(self) -> aiohttp.ClientSession:
        """Its connections; made when they are first wanted, in the loop that they belong to."""
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE, ttl_dns_cache=30),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_connect),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                trust_env=False,
            )
        return self._session

    async def close(self) -> None:
        """End its connections."""
        await self._client.close()
        if self._session is not None:
            await self._session.close()


class Stations:
    """All of them."""

    def __init__(
        self,
        spec: Spec,
        fleet: Fleet | None,
        environment: Mapping[str, str] = os.environ,
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises StartupError where the key of an upstream is not in the environment."""
        self._clock = clock
        self._fleet = fleet
        self._makers = {
            name: _maker(name, upstream, environment) for name, upstream in spec.upstreams.items()
        }
        self._by_upstream = {
            name: _stations(name, upstream, self._makers[name]) for name, upstream in spec.upstreams.items()
        }
        self.discovered = {
            name: upstream.replicas[0] for name, upstream in spec.upstreams.items() if upstream.discover
        }
        """Upstream → URL whose name has an address for each replica (discovery.py)."""
        self._kinds: dict[str, Kind] = {name: model.engine for name, model in spec.models.items()}
        self._of_fleet: dict[str, Station] = {}
        self._gone: list[Station] = []
        self.paces: dict[str, Pace] = {}
        """By place: what a token takes there."""
        if fleet is not None:
            fleet.subscribe(self._changed)
            for model in fleet.models():
                for replica in fleet.replicas(model):
                    self._changed(replica)

    def of(self, place: Place) -> Sequence[Station]:
        """Who serves a place now."""
        if not place.local:
            return self._by_upstream[place.name]
        if self._fleet is None:
            return ()
        return [
            self._of_fleet[each.name] for each in self._fleet.replicas(place.name) if each.state == "ready"
        ]

    def all(self) -> list[Station]:
        """Every one that is there."""
        stations = [each for group in self._by_upstream.values() for each in group]
        if self._fleet is not None:
            for model in self._fleet.models():
                stations += [
                    self._of_fleet[each.name]
                    for each in self._fleet.replicas(model)
                    if each.state == "ready" and each.name in self._of_fleet
                ]
        return stations

    async def found(self, upstream: str, addresses: Sequence[str]) -> tuple[list[str], list[str]]:
        """The replicas of an upstream that is discovered: those that are new have nothing behind them, those
        that are gone get no more requests, and end when theirs have.

        Args:
            addresses: of IP, each once.

        Returns: ids that are new, and that are gone.
        """
        before = {each.id: each for each in self._by_upstream[upstream]}
        base = URL(self.discovered[upstream])
        now: dict[str, Station] = {}
        for address in sorted(addresses):
            id = f"{upstream}/{address}"
            url = str(base.with_host(address)).rstrip("/")
            now[id] = before.get(id) or self._makers[upstream](id, url)
        self._by_upstream[upstream] = tuple(now.values())
        self._gone += [station for id, station in before.items() if id not in now]
        for station in [each for each in self._gone if each.in_flight == 0]:
            self._gone.remove(station)
            await station.close()
        return [id for id in now if id not in before], [id for id in before if id not in now]

    def pace(self, place: Place) -> Pace:
        """What a token takes at a place, of device time."""
        return self.paces.setdefault(f"{place.name}\0{place.model}", Pace())

    async def close(self) -> None:
        """End all connections."""
        for station in (*self.all(), *self._of_fleet.values(), *self._gone):
            await station.close()

    def _changed(self, replica: Replica) -> None:
        station = self._of_fleet.get(replica.name)
        if station is None or station.url != replica.url:
            if station is not None:
                self._gone.append(station)
            assert self._fleet is not None
            headers = {"Authorization": f"Bearer {self._fleet.key}"} if self._fleet.key else {}
            kind = self._kinds.get(replica.model, "penstock")
            trusted = kind == "penstock" and bool(headers)
            self._of_fleet[replica.name] = Station(
                replica.name, replica.url, kind, headers=headers, trusted=trusted
            )
        elif replica.state == "ready":  # a new process: its cache is empty, and its past is not its own
            station.prefixes.clear()
            station.health.started(self._clock())
            station.reported_at = float("-inf")


def _maker(name: str, upstream: Upstream, environment: Mapping[str, str]) -> Callable[[str, str], Station]:
    """What makes stations of an upstream, from their ids and URLs."""
    headers = dict(upstream.headers)
    if upstream.api_key_env is not None:
        key = environment.get(upstream.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise StartupError(
                f"upstreams.{name}: the environment variable {upstream.api_key_env} "
                + ("holds no key that can stand in a header." if key else "is not set."),
                advice=f"Set it to the key of {upstream.url}, or take api_key_env out of the spec.",
            )
        if upstream.kind == "anthropic":
            headers["x-api-key"] = key
        else:
            headers["Authorization"] = f"Bearer {key}"
    if upstream.kind == "anthropic":
        headers.setdefault("anthropic-version", _ANTHROPIC_VERSION)
    return lambda id, url: Station(
        id,
        url,
        upstream.kind,
        headers=headers,
        trusted=upstream.trusts_gateway,
        most=upstream.max_connections,
        timeouts=(upstream.timeout_connect, upstream.timeout_headers, upstream.timeout_idle),
    )


def _stations(name: str, upstream: Upstream, make: Callable[[str, str], Station]) -> tuple[Station, ...]:
    """Those that are known from the spec; of one that is discovered, none."""
    urls = () if upstream.discover else upstream.replicas
    return tuple(make(name if len(urls) == 1 else f"{name}/{index}", url) for index, url in enumerate(urls))
