"""One metered request: reserve, ask until somebody answers, say what it cost, commit.

    reserve ─▶ next replica ─▶ attempt ─▶ answered ─────────────▶ settle ─▶ commit
                  ▲               └─ failed, nothing seen yet ─┐    a stream broke: its beginning is a part,
                  └── pause ◀── somebody is left to be asked ◀─┘    and another replica goes on behind it

It knows one request and its state; what all requests share is the door's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from starlette.types import Send

from penstock.core.errors import PenstockError
from penstock.http.errors import internal
from penstock.http.exchange import ClientGone

from . import bill, quota
from .candidates import Candidates
from .charge import Charge
from .endpoints import Endpoint
from .envelope import Envelope
from .hooks import Verdict, told
from .owned import Renamer
from .policy.amounts import NANO, Amounts
from .policy.retries import ejects, pause
from .policy.routes import Place, Way
from .records import Asked, Principal, Row
from .relay import Exchange, Failed, Relay
from .resume import Resumption
from .stations import Station

if TYPE_CHECKING:
    from .door import Door
    from .tracing import AttemptSpan, RequestSpan

logger = logging.getLogger("penstock.gateway")

_FORWARDED = ("accept", "traceparent", "tracestate", "anthropic-version", "anthropic-beta", "openai-beta")
"""Headers of the client that an upstream sees."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what holds for this request."""

    principal: Principal
    headers: Mapping[str, str]
    tags: dict[str, str]
    local_only: bool
    background: bool = False
    """Nobody waits for it."""


class Request:
    """Of one client, or a copy for a shadow."""

    def __init__(
        self,
        door: Door,
        endpoint: Endpoint,
        envelope: Envelope,
        caller: Caller,
        way: Way,
        places: tuple[Place, ...],
        send: Send,
    ) -> None:
        self.door = door
        self.endpoint = endpoint
        self.envelope = envelope
        self.caller = caller
        self.way = way
        self.places = places
        self.send = send
        self.started = 0.0
        self.span: RequestSpan | None = None
        """Where requests are traced; copies are not."""
        self._attempt_span: AttemptSpan | None = None
        principal = caller.principal
        self.row = Row(
            id="",
            at=0,
            key_id=principal.key_id,
            key_name=principal.key_name,
            team=principal.team,
            tags=caller.tags,
            endpoint=endpoint.path,
            route=way.name,
        )
        self.exchange = Exchange()
        self.candidates = Candidates(self)
        self.rest = Resumption(self)
        self._relay: Relay | None = None
        self.place: Place | None = None
        self.station: Station | None = None
        self.asked: Asked | None = None
        """The last attempt."""
        self.charge = Charge(self)
        self.refusal: PenstockError | None = None
        """What hooks have said against it; its row says so."""
        self._later = False
        """Whether it is committed by somebody who looks at its answer first."""
        self.is_copy = False
        self.previous: tuple[str, str, Station] | None = None
        """What a response continues: its name, the upstream's id, and the only replica that knows it."""
        self.notes: list[str] = []
        self.held = False
        """Whether its answer is not for the client yet: somebody judges it first."""
        self.headers_out = False
        """Whether the client has the headers of an answer that is still to come."""
        self.earlier: Row | None = None
        """The row of the attempt whose answer did not do."""
        self.marks: list[tuple[bytes, bytes]] = []
        """More headers of its answer."""
        envelope.limit(way.route.max_tokens)
        self.row.uncapped = bool(endpoint.caps) and envelope.cap is None
        self.salt = f"team:{principal.team}" if principal.team else f"key:{principal.key_id}"

    async def run(self) -> None:
        """Reserve, ask, answer, commit."""
        await self.admit()
        await self.conclude(self.ask())

    async def admit(self, later: Amounts | None = None) -> None:
        """Reserve, also for what may come `later`. Raises what refuses the request: then it has ended."""
        if self.refusal is not None:
            await self._refuse(self.refusal)
        await self.charge.reserve(later)
        if self.span is not None:
            self.span.expect_row()

    async def ask(self) -> None:
        """Have somebody answer. Raises PenstockError where nobody does."""
        if not self.is_copy:
            self.door.shadow(self)
        await self._attempts()

    async def conclude(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what answers the request, and commit what has come of it, however it ends."""
        door, charge = self.door, self.charge
        try:
            await work
            if charge.handed_over:
                return
            self._end("upstream_failed" if self.exchange.broken is not None else "done", self.exchange.status)
            if self.inspects and self.exchange.whole:
                self._later = True
                door.behind(self._look_back())
        except asyncio.CancelledError:
            if self.exchange.sent and not self.held:  # it has all there is
                self._end("done", self.exchange.status)
            else:
                self._end("killed" if door.draining else "client_gone", 499)
            raise
        except ClientGone:
            self._end("client_gone", 499)
            raise
        except PenstockError as error:
            status = 200 if self.headers_out else error.status
            self._end("refused" if self.refusal is error else "upstream_failed", status)
            raise
        except Exception as error:
            failure = internal(error, f"request {self.row.id}")
            self._end("upstream_failed", failure.status)
            raise failure from None
        finally:
            if not (self._later or charge.handed_over):
                charge.conclude()

    async def _refuse(self, refusal: PenstockError) -> NoReturn:
        """Write a row that counts for nobody, and raise."""
        self._end("refused", refusal.status)
        await self.charge.nothing()
        raise refusal

    # ---- hooks that look at answers ----

    @property
    def inspects(self) -> bool:
        """Whether hooks look at its answer, now that it is one."""
        return not (self.is_copy or self.held) and self.door.hooks.wants("after", self.way.name)

    async def inspect(self, answer: bytes) -> bytes:
        """What hooks make of a whole answer. Raises their refusal: it is charged all the same."""
        verdict = await self._ask_hooks({"answer": msgspec.json.decode(answer)}, "answer")
        if verdict.refusal is not None:
            self.refusal = verdict.refusal
            raise verdict.refusal
        return answer if verdict.instead is None else msgspec.json.encode(verdict.instead)

    async def _look_back(self) -> None:
        """Show hooks a stream that the client has, and commit: they can tag its row, and no more."""
        try:
            events = bytes(self.exchange.seen).decode("utf-8", "replace")
            await self._ask_hooks({"events": events}, "")
        finally:
            await self.charge.commit_by_bill()

    def about(self) -> dict[str, Any]:
        """What hooks and verifiers are told of it."""
        row, body = self.row, msgspec.json.decode(self.envelope.write(self.places[0], None))
        return told(row.id, row.endpoint, row.route, (row.key_id, row.team, row.tags), body)

    async def _ask_hooks(self, more: dict[str, Any], rewrites: str) -> Verdict:
        row = self.row
        about = {**self.about(), "status": self.exchange.status, **more}
        stays = self.door.stays(self.way, self.caller)
        verdict = await self.door.hooks.ask("after", row.route, about, rewrites, stays)
        row.tags = {**row.tags, **verdict.tags, **self.caller.principal.tags}
        self.notes += verdict.notes
        return verdict

    def copy_for(self, place: Place) -> Request:
        """The same request for a shadow: with a row that nobody pays, and without a reader."""
        caller = self.caller
        principal = Principal(key_id="", key_name="shadow")
        nobody = Caller(principal, {}, caller.tags, caller.local_only, background=True)
        copy = Request(self.door, self.endpoint, self.envelope, nobody, self.way, (place,), _nowhere)
        copy.row.id = secrets.token_hex(16)
        copy.row.at, copy.started = self.row.at, self.started
        copy.row.note = f"shadow of {self.row.id}"
        copy.salt, copy.is_copy = self.salt, True
        return copy

    # ---- attempts ----

    async def _attempts(self) -> None:
        """Ask until somebody answers: as often as the route has it, and each fallback once more than that."""
        tried: set[str] = set()
        asked: set[Place] = set()
        failed: Failed | None = None
        number = spared = 0
        with contextlib.ExitStack() as used:
            while True:
                number += 1
                places = self.places
                if number > 1 + self.way.route.retries + spared:
                    places = tuple(
                        place for place in self.way.fallback if place in places and place not in asked
                    )
                found = await self.candidates.next(places, tried, used) if places else None
                if found is None:
                    raise self.candidates.unserved() if failed is None else self._told(failed)
                place, station = found
                if failed is not None:
                    elsewhere = station.id not in tried
                    seconds = pause(number - 1, failed.attempt, self.door.draw(), elsewhere=elsewhere)
                    if seconds is None:
                        raise self._told(failed)
                    if seconds:
                        await asyncio.sleep(seconds)
                tried.add(station.id)
                asked.add(place)
                try:
                    await self.attempt(place, station, number)
                    return
                except Failed as error:
                    failed = error
                if self.exchange.begun:
                    await self.rest.go_on(failed, place, number, tried, used)
                    return
                if not spared and await self.candidates.has_left(place, station, failed):
                    spared, failed = 1, None  # nobody was asked
                    tried.discard(station.id)
                    asked.discard(place)

    async def give_up(self, failed: Failed) -> None:
        """End a stream with an error: nobody goes on with it."""
        self.exchange.status, self.exchange.broken = 200, failed
        assert self._relay is not None
        await self._relay.give_up(failed)

    def _told(self, failed: Failed) -> PenstockError:
        return failed.error(self.row.upstream)

    async def attempt(self, place: Place, station: Station, number: int) -> None:
        """Ask one station. Raises Failed where another one may be asked."""
        door, row = self.door, self.row
        after = await door.bills.cursor(station)  # which may find that it is not trusted
        headers, bill_id = self._headers(station)
        asked = bill.note(self.way, place, station.id, bill_id, after, self.rest.behind)
        now = door.monotonic()
        exchange = self.exchange
        generated = self.rest.begin(station)
        if self.rest.transcript is not None:
            headers["x-penstock-stream-tokens"] = "1"
        self.place, self.station, self.asked = place, station, asked
        self.charge.attempted()
        if self.charge.reservation is not None and bill_id:
            door.meter.asked(self.charge.reservation, asked)
        row.upstream, row.replica, row.model, row.attempts = place.name, station.id, place.model, number
        row.context = min(filter(None, (self.way.route.context, place.context)), default=None)
        row.waited = row.waited or round((now - self.started) * NANO)
        body = self.envelope.write(place, self.salt, generated, background=self._background)
        inspect = self.inspect if self.inspects else None
        relay = self._relay = Relay(
            station,
            self.endpoint,
            exchange,
            self.send,
            self._renamer(station),
            inspect,
            self.rest.transcript,
        )
        if self.span is not None:
            self._attempt_span = self.span.attempt(place, station, number)
            self._attempt_span.inject(headers)
        station.in_flight += 1
        begun = station.share.begin(now)
        lost, part = False, None
        keep = door.fleet.use(place.name) if place.local and door.fleet else contextlib.nullcontext()
        try:
            with keep:
                await relay.run(
                    body,
                    headers,
                    usage_wanted=self.envelope.usage_wanted,
                    stream=self.envelope.stream,
                    extra=lambda: self._answer_headers(station, begun),
                )
        except Failed as error:
            self._failed(station, error)
            part = self.rest.broke(station, asked)
            lost = exchange.asked and part is None
            if lost:
                self.charge.wasted(asked, exchange)
            if lost and bill_id:  # it may have worked: its bill will say so
                row.owed += (msgspec.structs.replace(asked, lost=True),)
            self.asked, self.exchange = None, exchange.next()  # whatever comes now, this was no whole answer
            raise
        else:
            if exchange.broken is not None:
                self._failed(station, exchange.broken)
            else:
                station.health.succeeded(door.monotonic())
        finally:
            station.in_flight -= 1
            shared = self.charge.shared = station.share.end(begun, door.monotonic())
            if part is not None:
                part.shared = shared
            if lost and place.on_devices and not bill_id:
                row.lost_device_seconds += round(shared * NANO) * place.devices
            if self._attempt_span is not None:
                self._attempt_span.end(exchange.status)

    def _renamer(self, station: Station) -> Renamer | None:
        if not self.endpoint.owned:
            return None
        known = {} if self.previous is None else {self.previous[1]: self.previous[0]}
        return Renamer(self.door.owned, station, self.row.key_id, known)

    def _failed(self, station: Station, failed: Failed) -> None:
        door, attempt = self.door, failed.attempt
        door.metrics.attempt_failed(self.row.upstream, attempt.fault)
        self.row.failed += ((self.row.upstream, self.row.model),)
        if self._attempt_span is not None:
            self._attempt_span.failed(attempt)
        if ejects(attempt):
            station.health.failed(door.monotonic())
        self.notes.append(f"{station.id}: {attempt.fault}" + (f" {attempt.status}" if attempt.status else ""))
        logger.warning("request %s: the upstream %s %s", self.row.id, station.id, failed.message)

    @property
    def _background(self) -> bool:
        return self.caller.background or self.way.route.service_class == "background"

    def _headers(self, station: Station) -> tuple[dict[str, str], str]:
        """Of the request to an upstream; and what its bill will be called, if there will be one."""
        given = self.caller.headers
        headers = {name: given[name] for name in _FORWARDED if name in given}
        headers["content-type"] = "application/json"
        headers["accept-encoding"] = "identity"
        headers["x-request-id"] = self.row.id
        if not station.trusted:
            return headers, ""
        # clients choose ids, and may repeat them; a bill is of one attempt
        headers["x-request-id"] = bill_id = f"{self.row.id[:200]}.{secrets.token_hex(4)}"
        headers["x-penstock-tenant"] = self.salt
        headers["x-penstock-class"] = "background" if self._background else "realtime"
        return headers, bill_id

    # ---- what its answer says ----

    def _answer_headers(self, station: Station, begun: float) -> list[tuple[bytes, bytes]]:
        """What an answer says of its way; of a whole one, also what it cost."""
        charge, row = self.charge, self.row
        headers = quota.standing(charge.reservation, self.door.wall()) if charge.reservation else []
        if not self.door.spec.gateway.expose_routing:
            return headers
        headers.append((b"x-penstock-upstream", row.upstream.encode()))
        headers.append((b"x-penstock-route", row.route.encode()))
        headers += self.marks
        tally = self.exchange.tally
        if tally.final and tally.told and not self.envelope.stream:  # some streams tell it so far, first
            charge.shared = station.share.peek(begun, self.door.monotonic())
            charge.settle()
            rows = [row] if self.earlier is None else [row, self.earlier]
            for name, amounts in (
                (b"x-penstock-cost", [each.dollars for each in rows]),
                (b"x-penstock-device-seconds", [each.device_seconds for each in rows]),
            ):
                known = [amount for amount in amounts if amount is not None]
                if known:
                    headers.append((name, _decimal(sum(known))))
        return headers

    def _end(self, end: str, status: int) -> None:
        self.row.end, self.row.status = end, status


async def _nowhere(message: object) -> None:
    """The reader of a shadow."""


def _decimal(nano: int) -> bytes:
    """Nanodollars or nanoseconds as a plain decimal."""
    whole, rest = divmod(nano, NANO)
    return f"{whole}.{rest:09d}".encode()
