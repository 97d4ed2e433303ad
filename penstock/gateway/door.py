"""The way of a metered request through the gateway, and what ends it.

    who (key) ─▶ body ─▶ where (way, places) ─▶ may he (reserve) ─▶ attempts ─▶ row, commit
                                                     a model that starts · a pause · the next replica

Whatever happens after `reserve`, `commit` is called once: a request has one row. It knows the order of
things; what is decided is in `policy`, what is sent in `relay`, what it costs in `bill`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import AuthenticationFailed, Draining, InvalidRequest, PenstockError, quote
from penstock.http.auth import bearer
from penstock.http.body import parse_object, read_body
from penstock.http.errors import send_error
from penstock.http.exchange import ClientGone, until_disconnect
from penstock.spec.model import Spec

from . import hosted, quota
from .admin import Admin
from .bills import Bills
from .cascade import Cascade, cascades
from .endpoints import Endpoint
from .envelope import Envelope
from .files.pages import Files
from .fleet import Fleet
from .hooks import Hooks, Verdict, told
from .keys import Keys
from .meter import LimitReached, Meter
from .metrics import Metrics
from .outcomes import Outcomes
from .owned import Owned
from .policy.limits import Entitlements
from .policy.routes import Book, Place, Way, order, shadows
from .policy.weights import Steering, holds, weighed
from .probes import Prober
from .request import Caller, Request
from .secret import Secret
from .stations import Station, Stations
from .tasks import Beside
from .tracing import SPAN, Tracing
from .verifiers import Verifiers

logger = logging.getLogger("penstock.gateway")

LOCAL_ONLY = "x-penstock-local-only"
"""Header with which a request says that it must not leave the house."""
_TAG_LENGTH = 128
_LAST_WORK = 3.0
"""Seconds that bills and copies get at the end."""
_SHADOWS = 64
"""Copies under way at most; more are not made."""


class Door:
    """All that requests share. It is the `Worker` of `http.serve`."""

    failure: PenstockError | None = None

    def __init__(
        self,
        spec: Spec,
        keys: Keys,
        meter: Meter[Any],
        stations: Stations,
        fleet: Fleet | None = None,
        *,
        metrics: Metrics | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
        draw: Callable[[], float] = random.random,
        id_secret: bytes | None = None,
    ) -> None:
        """
        Args:
            monotonic: seconds.
            wall: Unix time in nanoseconds.
            draw: numbers of [0, 1), for weights, ties and pauses.
            id_secret: what makes the ids of responses its own; all gateways in front of the same upstreams
                have the same. Without one, ids end with this process.
        """
        self.spec = spec
        self.keys = keys
        self.meter = meter
        self.stations = stations
        self.fleet = fleet
        self.book = Book(spec)
        self.hooks = Hooks(spec.gateway.hooks)
        self.verifiers = Verifiers(spec)
        self.owned = Owned(id_secret or secrets.token_bytes(32))
        self.entitlements = Entitlements(spec)
        self.metrics = metrics or Metrics()
        self.monotonic, self.wall, self.draw = monotonic, wall, draw
        self.admin: Admin | None = None
        self.metrics_key: Secret | None = None
        """What `/metrics` wants; None where everybody may read it."""
        self.tracing: Tracing | None = None
        self.prober = Prober(stations, monotonic)
        self.bills = Bills(stations, self.metrics)
        self.beside: list[Beside] = [self.prober, self.bills]
        """What runs beside requests."""
        self.files: Files | None = None
        """Files and batches, which need a ledger in a database."""
        self.outcomes: Outcomes | None = None
        """What is told of requests later, which needs one, too."""
        self._running: set[asyncio.Task[None]] = set()
        self._behind: set[asyncio.Task[None]] = set()
        self._draining = False
        self._idle = asyncio.Event()

    def steer(self, steerings: Sequence[Steering]) -> None:
        """From the next request on, routes share out requests as was said; all of them at once. What is under
        way goes on as it began."""
        for each in steerings:
            if not holds(self.spec, each):
                logger.warning(
                    "weights that were set for the route %s are void: the spec has changed since, and counts",
                    quote(each.route),
                )
        self.book = Book(weighed(self.spec, steerings))

    # ---- who ----

    async def caller(self, scope: Scope) -> Caller:
        """Who asks. Raises AuthenticationFailed, with no hint as to what is wrong with the key, and Forbidden
        for one whose team the spec does not have."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        secret = headers.get("x-api-key", "")
        if given := headers.get("authorization"):
            secret = bearer(given) or ""
        if not secret:
            raise AuthenticationFailed(
                "No API key was provided.", advice="Send the header `Authorization: Bearer KEY`."
            )
        principal = await self.keys.principal(secret)
        if principal is None:
            raise AuthenticationFailed("The API key is wrong.")
        self.book.know(principal.team)
        tags = {}
        for tag, name in self.spec.gateway.tag_headers.items():
            value = headers.get(name.lower(), "")
            if value and len(value) <= _TAG_LENGTH and value.isprintable():
                tags[tag] = value
        tags.update(principal.tags)
        book = self.book
        local_only = (
            principal.local_only
            or book.team_local_only(principal.team)
            or book.tags_local_only(tags)
            or _asked_to_stay(headers)
        )
        background = (
            principal.service_class == "background"
            or book.in_background(principal.team, tags)
            or headers.get("x-penstock-class") == "background"  # a client may lower its class, never raise it
        )
        return Caller(principal, headers, tags, local_only, background)

    # ---- one request ----

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises PenstockError where it is refused before it counts."""
        arrived, started = self.wall(), self.monotonic()
        scope["error_body"] = endpoint.error
        try:
            caller = await self.caller(scope)
            body = await read_body(scope, receive, self.spec.gateway.max_body_bytes)
            if self._draining:
                raise Draining("The gateway is shutting down.", retry_after=1)
            envelope = Envelope(body, endpoint)
            envelope.refuse(endpoint.refused)
            if self.outcomes is not None:
                self.outcomes.hear(caller)
            principal = caller.principal
            way = self.book.find(
                envelope.model, caller.headers, caller.tags, principal.team, principal.routes
            )
            scope["request_id"] = self.new_id(scope)
            verdict = None
            if self.hooks.wants("before", way.name):
                verdict = await self._before(scope["request_id"], way, body, envelope, caller)
                envelope, caller = self._as_said(verdict, envelope, caller)
            hosted.check(envelope, way)
            places = self._places(way, caller)
            previous = self._previous(envelope, caller) if endpoint.owned else None
        except PenstockError as error:
            self.metrics.refused(error.code or str(error.status))
            raise
        untouched = None if way.escalation is None else envelope.copy()
        request = Request(self, endpoint, envelope, caller, way, places, send)
        request.row.id = scope["request_id"]
        request.row.at = arrived
        request.started = started
        request.previous = previous
        request.span = scope.get(SPAN)
        if verdict is not None:
            request.notes += verdict.notes
            request.refusal = verdict.refusal
        run = request.run
        if way.escalation is not None and untouched is not None and cascades(request):
            run = Cascade(self, request, way.escalation, untouched).run
        with self.under_way():
            try:
                await until_disconnect(receive, run())
            except LimitReached as error:
                self.metrics.refused(error.code or "")
                await send_error(send, error, quota.refusal(error, self.wall()), body=endpoint.error)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Around each request: a door that closes waits for it."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()

    def new_id(self, scope: Scope) -> str:
        """Of a row; it begins with the client's own."""
        return _row_id(scope["client_request_id"])

    async def _before(self, id: str, way: Way, body: bytes, envelope: Envelope, caller: Caller) -> Verdict:
        """What hooks say of a request."""
        owner = (caller.principal.key_id, caller.principal.team, caller.tags)
        about = told(id, envelope.endpoint.path, way.name, owner, parse_object(body))
        stays = self.stays(way, caller)
        return await self.hooks.ask("before", way.name, about, "body", stays)

    def stays(self, way: Way, caller: Caller) -> Callable[[Mapping[str, str]], bool]:
        """Whether a request must not leave the house, by its tags, of which hooks may give it more."""
        return lambda tags: way.stays(caller.local_only or self.book.tags_local_only(tags))

    def _as_said(self, verdict: Verdict, envelope: Envelope, caller: Caller) -> tuple[Envelope, Caller]:
        """The request as hooks have made it. They change neither its model nor whether it streams, which the
        gateway has decided by already; and the key's own tags win over theirs."""
        if verdict.instead is not None:
            body = {**verdict.instead, "model": envelope.model, "stream": envelope.stream}
            envelope = Envelope(encode(body), envelope.endpoint)
            envelope.refuse(envelope.endpoint.refused)
        if verdict.tags:
            tags = {**caller.tags, **verdict.tags, **caller.principal.tags}
            local_only = caller.local_only or self.book.tags_local_only(tags)
            background = caller.background or self.book.in_background("", tags)
            caller = Caller(caller.principal, caller.headers, tags, local_only, background)
        return envelope, caller

    def shadow(self, request: Request) -> None:
        """Send copies to those who get one; nobody waits for them."""
        way = request.way
        if not way.shadow or request.previous is not None:  # what it continues is at one replica only
            return
        draws = [self.draw() for _ in way.shadow]
        for place in shadows(way, request.caller.local_only, draws):
            if len(self._behind) >= _SHADOWS:
                return
            self.behind(_quietly(request.copy_for(place)))

    def behind(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that no client waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    def _previous(self, envelope: Envelope, caller: Caller) -> tuple[str, str, Station] | None:
        """What a response continues: its name, the upstream's id, its replica. Raises NotFound."""
        name = envelope.text("previous_response_id")
        if name is None:
            return None
        id, station = self.owned.read(name, self.stations.all(), caller.principal.key_id)
        envelope.put("previous_response_id", id)
        return name, id, station

    def _places(self, way: Way, caller: Caller) -> tuple[Place, ...]:
        targets, fallback = way.places(caller.local_only)
        return order(targets, fallback, [self.draw() for _ in targets])

    def start(self) -> None:
        """Begin what runs beside requests, in the running loop."""
        for each in self.beside:
            each.start()

    # ---- Worker ----

    @property
    def load(self) -> int:
        """Requests under way."""
        return len(self._running)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return when all running ones have ended, or were ended after `timeout`."""
        self._draining = True
        self._idle.clear()
        if self._running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)
        if self._behind:
            await asyncio.wait(self._behind, timeout=_LAST_WORK)
        tasks = set(self._running) | self._behind
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    async def close(self) -> None:
        """Write what is written behind, and end all connections."""
        for each in reversed(self.beside):
            await each.stop()
        for task in self._behind:
            task.cancel()
        await asyncio.gather(*self._behind, return_exceptions=True)
        if self.admin is not None:
            self.admin.close()
        await self.hooks.close()
        await self.verifiers.close()
        await self.meter.close()
        await self.stations.close()
        if self.tracing is not None:
            await self.tracing.close()


async def _quietly(request: Request) -> None:
    """Run a shadow: what becomes of it is in its row."""
    with contextlib.suppress(PenstockError, ClientGone):
        await request.run()


def _asked_to_stay(headers: Mapping[str, str]) -> bool:
    """Whether a request says itself that it must not leave the house. Raises InvalidRequest."""
    value = headers.get(LOCAL_ONLY, "false").strip().lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"The header {LOCAL_ONLY} must be true or false, got {quote(value)}.")
    return value == "true"


def _row_id(given: str | None) -> str:
    """A new id; the client's own is its beginning, so that it is found, and a repeated one is none twice."""
    if given and len(given) <= 64 and given.isascii():
        return f"{given}.{secrets.token_hex(4)}"
    return secrets.token_hex(16)
