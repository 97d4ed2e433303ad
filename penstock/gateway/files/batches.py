"""Batches: reserved for at their worst, sent to the upstream that has their input, and settled when they end.

POST /v1/batches ─▶ what its lines may use, from the file ─▶ reserve ─▶ objects: asked ─▶ upstream
     accepted       row `unsettled` at its reservation; objects: running; settling.py does the rest
     refused        nothing is charged
     no answer      row `unsettled`; settling.py looks for it in the upstream's list
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.core.errors import (
    Draining,
    InvalidRequest,
    PenstockError,
    Unavailable,
    UnsupportedParameter,
    brief,
    quote,
)
from penstock.gateway import quota
from penstock.gateway.metering import Reserved
from penstock.gateway.owned import ID, NotFound
from penstock.gateway.policy.amounts import NANO, Amounts
from penstock.gateway.policy.retries import Attempt
from penstock.gateway.policy.routes import Place, Way
from penstock.gateway.records import Row
from penstock.gateway.relay import Failed
from penstock.gateway.request import Caller
from penstock.gateway.stations import Station
from penstock.gateway.tracing import SPAN, RequestSpan
from penstock.http.body import parse_object, read_body
from penstock.http.exchange import respond
from penstock.http.lists import Query, page_of

from .common import TAG, Shared
from .desk import BATCH
from .lines import Contents, place_of
from .objects import Kept
from .settling import ENDED, Settling
from .terms import Terms, rate, worst
from .upstream import Missing, UpstreamSaysNo, ask

PATH = "/v1/batches"
_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
_MOST_LISTED, _LISTED = 100, 20
_MOST_METADATA = 15
"""Pairs, of OpenAI's 16: one is the gateway's."""
_AT_ONCE = 8


class Batches:
    """Where batches are."""

    def __init__(self, shared: Shared, settling: Settling) -> None:
        self._shared = shared
        self._door = shared.door
        self._settling = settling

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/batches"""
        door, shared = self._door, self._shared
        arrived, started = door.wall(), door.monotonic()
        caller = await door.caller(scope)
        body = parse_object(await read_body(scope, receive, door.spec.gateway.max_body_bytes))
        if door.draining:
            raise Draining("The gateway is shutting down.", retry_after=1)
        _check(body)
        file, station, contents = await self._input(body, caller)
        way, place = self._where(contents, station, caller)
        scope["request_id"] = door.new_id(scope)
        row = Row(
            id=scope["request_id"],
            at=arrived,
            key_id=caller.principal.key_id,
            key_name=caller.principal.key_name,
            team=caller.principal.team,
            tags={**caller.tags, **contents.tags, **caller.principal.tags},
            endpoint=PATH,
            route=way.name,
            upstream=place.name,
            replica=station.id,
            model=place.model,
            pool=place.pool,
            attempts=1,
            note=brief("; ".join([f"{contents.lines} requests", *contents.notes]), 300),
        )
        most = worst(place, contents.worst, door.stations.pace(place))
        # it runs for up to a day: what a minute may have is no measure for it
        limits = [
            limit
            for limit in door.entitlements.of(row.key_id, row.team, row.tags, caller.principal.limits)
            if limit.unit != "tokens"
        ]
        reservation = await shared.meter.reserve(row, limits, most)
        headers = quota.standing(reservation, door.wall())
        asking = shared.headers(row.id, station, caller)
        sent = _Sent(shared, reservation, most, started, asking)
        terms = Terms(
            worker=shared.meter.journal.worker,
            number=reservation.number,
            request_id=row.id,
            input=file,
            rate=rate(place.price),
            comparator=rate(way.comparator),
            device=place.device,
            devices=place.devices,
            device_price=None if place.price is not None else place.device_price,
            place=f"{place.name}\0{place.model}",
        )
        span: RequestSpan | None = scope.get(SPAN)
        if span is not None:
            span.expect_row()
        try:
            answer = await sent.run(body, terms, station, place)
        finally:
            if span is not None:
                span.row(row)
        headers.append((b"x-penstock-upstream", row.upstream.encode()))
        headers.append((b"x-penstock-route", row.route.encode()))
        if not door.spec.gateway.expose_routing:
            headers = headers[:-2]
        answer = shared.named(answer, station, row.key_id)
        answer["input_file_id"] = body["input_file_id"]
        await respond(
            send,
            msgspec.json.encode(answer),
            headers={name.decode(): value.decode() for name, value in headers},
        )

    async def list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/batches"""
        shared = self._shared
        caller = await self._door.caller(scope)
        key_id, stations = caller.principal.key_id, shared.stations()
        query = Query(scope, ("after", "limit"))
        limit, after = query.limit(_LISTED, _MOST_LISTED), query.text("after")
        edge = None
        if after is not None:
            id, station = shared.where(after, caller)
            edge = station.id, id
        found, more = await shared.store(
            lambda: shared.objects.page(
                "batch", key_id, list(stations), after=edge, limit=limit, now=self._door.wall()
            )
        )
        free = asyncio.Semaphore(_AT_ONCE)

        async def fresh(kept: Kept) -> dict[str, Any]:
            station = stations[kept.replica]
            batch: dict[str, Any] = msgspec.json.decode(kept.body)
            if kept.state == "running" and batch.get("status") not in ENDED:
                async with free:
                    try:
                        batch = await ask(station, "GET", f"{PATH}/{kept.id}")
                        self._heard(kept, batch, station)
                    except (Failed, Missing, UpstreamSaysNo):
                        pass  # what it said last
            return shared.named(batch, station, key_id)

        data = await asyncio.gather(*map(fresh, found))
        await respond(send, msgspec.json.encode(page_of(list(data), more)))

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/batches/NAME"""
        await self._about(scope, send, "GET", "")

    async def cancel(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/batches/NAME/cancel"""
        await self._about(scope, send, "POST", "/cancel")

    async def _about(self, scope: Scope, send: Send, method: str, suffix: str) -> None:
        shared = self._shared
        caller = await self._door.caller(scope)
        name = scope["path_params"]["name"]
        id, station = shared.where(name, caller)
        with shared.told(station, {id: name}):
            headers = {"x-request-id": scope["request_id"]}
            batch = await ask(station, method, f"{PATH}/{id}{suffix}", headers=headers)
        kept = await shared.store(lambda: shared.objects.find(station.id, id))
        if kept is not None:
            self._heard(kept, batch, station)
        await respond(send, msgspec.json.encode(shared.named(batch, station, caller.principal.key_id)))

    def _heard(self, kept: Kept, batch: dict[str, Any], station: Station) -> None:
        """Settle a batch of which a client has heard that it has ended."""
        if kept.state == "running" and batch.get("status") in ENDED:
            self._door.behind(self._quietly(kept, batch, station))

    async def _quietly(self, kept: Kept, batch: dict[str, Any], station: Station) -> None:
        try:
            await self._settling.told(kept, batch, station)
        except (Failed, Missing, PenstockError):
            pass  # it is asked about again

    async def _input(self, body: dict[str, Any], caller: Caller) -> tuple[str, Station, Contents]:
        """The upstream's id of the input, who has it, and what its lines may use. Raises NotFound,
        InvalidRequest."""
        shared, name = self._shared, body["input_file_id"]
        id, station = shared.where(name, caller)
        kept = await shared.store(lambda: shared.objects.find(station.id, id))
        if kept is None or kept.kind != "file" or kept.key_id != caller.principal.key_id:
            raise NotFound(f"There is no {quote(name)}.", param="input_file_id")
        contents = msgspec.json.decode(kept.about, type=Contents)
        if kept.purpose != BATCH or not contents.lines:
            raise InvalidRequest(
                f"{quote(name)} is no input of a batch.",
                param="input_file_id",
                advice="Upload one with `purpose=batch`.",
            )
        if contents.endpoint != body["endpoint"]:
            raise InvalidRequest(
                f"endpoint is {quote(body['endpoint'])}, and the file's lines are for {contents.endpoint}.",
                param="endpoint",
            )
        return id, station, contents

    def _where(self, contents: Contents, station: Station, caller: Caller) -> tuple[Way, Place]:
        """The route and the place of a batch, which are as they were when its input was uploaded. Raises
        ModelNotFound, Forbidden, InvalidRequest."""
        door, principal = self._door, caller.principal
        for name in contents.names or [contents.route]:
            way = door.book.find(name, caller.headers, caller.tags, principal.team, principal.routes)
            place = place_of(door.spec, way, caller.local_only)
            same = (way.name, place.name, place.model) == (contents.route, contents.upstream, contents.model)
            if not same or station not in door.stations.of(place):
                break
        else:
            return way, place
        raise InvalidRequest(
            f"{quote(name)} went to {contents.route} at {contents.upstream} when the file was uploaded, and "
            "goes elsewhere now.",
            param="input_file_id",
            advice="Upload the file again.",
        )


class _Sent:
    """One batch on its way to the upstream: whatever happens, its reservation is committed once."""

    def __init__(
        self,
        shared: Shared,
        reservation: Reserved,
        most: Amounts,
        started: float,
        headers: dict[str, str],
    ) -> None:
        self._shared = shared
        self._door = shared.door
        self._headers = headers
        self._reservation = reservation
        self._row = reservation.row
        self._most = most
        self._started = started
        self._known = True
        """Whether it is known what has become of it."""
        self._accepted = False

    async def run(self, body: dict[str, Any], terms: Terms, station: Station, place: Place) -> dict[str, Any]:
        """Ask. Raises PenstockError where nothing came of it, or nobody knows."""
        shared, row = self._shared, self._row
        asked_for = f"?{row.id}"
        pending = Kept(
            replica=station.id,
            id=asked_for,
            kind="batch",
            key_id=row.key_id,
            created=row.at,
            state="asked",
            checked=row.at,
            about=msgspec.json.encode(terms),
        )
        row.end, row.status = "upstream_failed", 503
        try:
            await shared.store(lambda: shared.objects.add(pending))
            metadata = {**(body.get("metadata") or {}), TAG: row.id}
            given = {**body, "input_file_id": terms.input, "metadata": metadata}
            names = {terms.input: str(body["input_file_id"])}
            try:
                with shared.told(station, names):
                    answer = await self._ask(given, station)
            finally:
                if self._known and not self._accepted:
                    with contextlib.suppress(Unavailable):  # settling.py finds that there is none
                        await shared.store(lambda: shared.objects.remove(station.id, asked_for))
            values = {"id": str(answer["id"]), "state": "running", "body": msgspec.json.encode(answer)}
            await shared.store(lambda: shared.objects.change(station.id, asked_for, **values))
            row.end, row.status = "done", 200
            return answer
        except asyncio.CancelledError:
            row.end, row.status = "killed", 499
            raise
        except PenstockError as error:
            row.end, row.status = "upstream_failed", error.status
            raise
        finally:
            self._commit(place)

    async def _ask(self, given: dict[str, Any], station: Station) -> dict[str, Any]:
        self._known = False
        try:
            headers = {**self._headers, "content-type": "application/json"}
            data = msgspec.json.encode(given)
            answer = await ask(station, "POST", PATH, data=data, headers=headers)
            id = answer.get("id")
            if not isinstance(id, str) or not ID.fullmatch(id):
                raise Failed(Attempt("invalid"), "answered without an id that can be one")
        except Failed as failed:
            # who says that it failed has not begun, and who could not be reached neither
            self._known = failed.attempt.fault in ("connect", "status")
            raise
        except (Missing, UpstreamSaysNo):
            self._known = True
            raise
        self._known = self._accepted = True
        return answer

    def _commit(self, place: Place) -> None:
        door, row, most = self._door, self._row, self._most
        row.total = row.first_byte = round((door.monotonic() - self._started) * NANO)
        used = Amounts()
        row.settlement = "settled"
        if self._accepted or not self._known:
            used, row.settlement = most, "unsettled"
            row.pool, row.device = place.pool, place.device
        # what it is charged in the end is counted then
        door.metrics.ended(row)
        if self._accepted or not self._known:
            row.dollars = most.dollars if place.price or place.device_price is not None else None
            row.device_seconds = most.device_seconds if place.on_devices else None
        self._shared.meter.commit(self._reservation, used)


def _check(body: dict[str, Any]) -> None:
    """Raises InvalidRequest, naming the field."""
    for name in body:
        if name not in _FIELDS:
            raise UnsupportedParameter(f"{quote(name)} is not supported by this gateway.", param=name)
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(name), str):
            raise InvalidRequest(f"{name} must be a string, got {quote(body.get(name))}.", param=name)
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict) or len(metadata) > _MOST_METADATA or TAG in metadata:
        raise InvalidRequest(
            f"metadata must be an object of at most {_MOST_METADATA} pairs, without {TAG}.", param="metadata"
        )
