"""Files: taken from clients, given to upstreams, and only to their owners again.

POST /v1/files        form ─▶ of a batch: lines ─▶ upstream ─▶ objects
GET /v1/files         objects
GET, DELETE …/NAME    the upstream that has it; GET …/NAME/content: byte by byte
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import IO, Any

import aiohttp
import msgspec
from starlette.types import Receive, Scope, Send

from penstock.core.errors import Draining, InvalidRequest, PenstockError, quote
from penstock.gateway.owned import ID
from penstock.gateway.policy.retries import Attempt
from penstock.gateway.policy.routes import Forbidden, Place
from penstock.gateway.relay import Failed
from penstock.gateway.request import Caller
from penstock.gateway.stations import NoReplica, Station
from penstock.http.exchange import respond, until_disconnect
from penstock.http.form import Form, nameless, read_form
from penstock.http.lists import Query, page_of

from .common import Shared, TooMany, TooSlow, whole
from .lines import Contents, Lines, NoFiles, place_of
from .objects import Kept
from .upstream import Missing, ask, asked

BATCH = "batch"
"""The purpose of files that are a batch's input."""
_PURPOSE = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_MOST_LISTED, _LISTED = 10_000, 1000
_PIECE = 64 << 10


class Desk:
    """Where files are."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._door = shared.door
        self._limits = shared.door.spec.gateway.files
        self._uploads = 0

    async def upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/files"""
        caller = await self._door.caller(scope)
        if self._door.draining:
            raise Draining("The gateway is shutting down.", retry_after=1)
        if self._uploads >= self._limits.max_uploads:
            raise TooMany(
                f"{self._uploads} files are being uploaded already.",
                advice="The gateway's limit is gateway.files.max_uploads.",
                retry_after=5,
            )
        self._uploads += 1
        try:
            form = await read_form(scope, receive, self._limits.max_bytes, self._shared.folder)
            with form.file:
                answer = await self._take(form, caller, scope["request_id"])
        finally:
            self._uploads -= 1
        await respond(send, msgspec.json.encode(answer))

    async def list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/files"""
        shared = self._shared
        caller = await self._door.caller(scope)
        key_id, stations = caller.principal.key_id, shared.stations()
        query = Query(scope, ("after", "limit", "order", "purpose"))
        limit, oldest_first = query.limit(_LISTED, _MOST_LISTED), query.oldest_first()
        after, purpose = query.text("after"), query.text("purpose")
        edge = None
        if after is not None:
            id, station = shared.where(after, caller)
            edge = station.id, id
        found, more = await shared.store(
            lambda: shared.objects.page(
                "file",
                key_id,
                list(stations),
                after=edge,
                limit=limit,
                now=self._door.wall(),
                purpose=purpose,
                oldest_first=oldest_first,
            )
        )
        data = [
            shared.named(msgspec.json.decode(each.body), stations[each.replica], key_id) for each in found
        ]
        await respond(send, msgspec.json.encode(page_of(data, more)))

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/files/NAME"""
        await self._about(scope, send)

    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """DELETE /v1/files/NAME"""
        await self._about(scope, send)

    async def content(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/files/NAME/content"""
        caller = await self._door.caller(scope)
        name = scope["path_params"]["name"]
        id, station = self._shared.where(name, caller)
        await until_disconnect(receive, self._content(id, name, station, scope["request_id"], send))

    async def _about(self, scope: Scope, send: Send) -> None:
        shared = self._shared
        caller = await self._door.caller(scope)
        name = scope["path_params"]["name"]
        method = "DELETE" if scope["method"] == "DELETE" else "GET"
        id, station = shared.where(name, caller)
        with shared.told(station, {id: name}):
            try:
                headers = {"x-request-id": scope["request_id"]}
                answer = await ask(station, method, f"/v1/files/{id}", headers=headers)
            except Missing:
                await shared.store(lambda: shared.objects.remove(station.id, id))
                raise
        if method == "DELETE" and answer.get("deleted") is True:
            await shared.store(lambda: shared.objects.remove(station.id, id))
        await respond(send, msgspec.json.encode(shared.named(answer, station, caller.principal.key_id)))

    async def _content(self, id: str, name: str, station: Station, request_id: str, send: Send) -> None:
        """Relay a file. What breaks after its beginning cuts the client's connection: no half of a file looks
        like all of it."""
        headers, idle = {"x-request-id": request_id}, station.timeout_idle
        loop = asyncio.get_running_loop()
        path = f"/v1/files/{id}/content"
        with self._shared.told(station, {id: name}):
            first = station.timeout_connect + station.timeout_headers
            async with asked(station, "GET", path, timeout=first, headers=headers) as (response, timer):
                timer.reschedule(None)  # a client that reads slowly is no upstream that writes slowly
                await send(
                    {"type": "http.response.start", "status": 200, "headers": _content_headers(response)}
                )
                while True:
                    timer.reschedule(loop.time() + idle)
                    piece = await response.content.read(_PIECE)
                    timer.reschedule(None)
                    if not piece:
                        break
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    # ---- uploads ----

    async def _take(self, form: Form, caller: Caller, request_id: str) -> dict[str, Any]:
        """Give a form to an upstream; what is said of it then."""
        purpose = form.fields["purpose"]
        if not _PURPOSE.fullmatch(purpose):
            raise InvalidRequest(f"{quote(purpose)} is no purpose of a file.", param="purpose")
        named = self._named_place(form.fields, caller)
        if purpose != BATCH:
            place = named or self._only_place(caller)
            return await self._send(form, form.file, Contents(), place, caller, request_id)
        lines = Lines(self._door, caller, request_id, self._limits)
        with await asyncio.to_thread(nameless, self._shared.folder) as file:
            try:
                async with asyncio.timeout(self._limits.timeout):
                    contents = await lines.rewrite(form.file, file)
            except TimeoutError:
                raise TooSlow(
                    f"The lines of the file were not looked at within {self._limits.timeout:g} s.",
                    advice="Hooks may be slow: the gateway's limit is gateway.files.timeout.",
                    retry_after=5,
                ) from None
            assert lines.place is not None
            if named is not None and named.name != lines.place.name:
                raise InvalidRequest(
                    f"The form's model goes to {named.name}, and those of its lines to {lines.place.name}.",
                    param="model",
                )
            form.content_type = "application/jsonl"
            return await self._send(form, file, contents, lines.place, caller, request_id)

    def _named_place(self, fields: dict[str, str], caller: Caller) -> Place | None:
        """Where the form says that it goes: by a model, as LiteLLM's clients name it, too."""
        model = fields.get("model") or fields.get("target_model_names")
        if not model:
            return None
        principal = caller.principal
        way = self._door.book.find(model, caller.headers, caller.tags, principal.team, principal.routes)
        return place_of(self._door.spec, way, caller.local_only)

    def _only_place(self, caller: Caller) -> Place:
        """The only upstream with files among those that this key's requests reach. Raises NoFiles."""
        found: dict[str, Place] = {}
        principal, spec = caller.principal, self._door.spec
        for _, way in self._door.book.names(principal.team, principal.routes):
            try:
                targets, fallback = way.places(caller.local_only)
            except Forbidden:
                continue
            for place in (*targets, *fallback):
                if not place.local and spec.upstreams[place.name].files:
                    found.setdefault(place.name, place)
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise NoFiles(
                f"It is not clear which upstream this file is for: {', '.join(sorted(found))} take files.",
                param="model",
                advice="Send the field `model` with the form (extra_body of OpenAI's client): the file goes "
                "where that model's requests go.",
            )
        raise NoFiles(
            "No upstream that this key can use takes files.",
            advice="In penstock.yaml, an upstream that has /v1/files says `files: true`.",
        )

    async def _send(
        self,
        form: Form,
        file: IO[bytes],
        contents: Contents,
        place: Place,
        caller: Caller,
        request_id: str,
    ) -> dict[str, Any]:
        """Upload, and remember whose it is. It goes on to its end if the client leaves: the file is the
        client's then, and in its list."""
        shared, key_id = self._shared, caller.principal.key_id
        station, answer = await self._upload(form, file, place, caller, request_id)
        id = answer.get("id")
        with shared.told(station, {}):
            if not isinstance(id, str) or not ID.fullmatch(id):
                raise Failed(Attempt("invalid"), "answered without an id that can be one")
        expires = whole(answer.get("expires_at"))
        kept = Kept(
            replica=station.id,
            id=id,
            kind="file",
            key_id=key_id,
            purpose=str(answer.get("purpose") or form.fields["purpose"])[:64],
            created=self._door.wall(),
            expires=None if expires is None else min(expires * 1_000_000_000, (1 << 63) - 1),
            body=msgspec.json.encode(answer),
            about=msgspec.json.encode(contents),
        )
        try:
            await shared.store(lambda: shared.objects.add(kept))
        except PenstockError:
            # nobody could use it, or find it to delete it
            self._door.behind(_forget(station, id))
            raise
        return shared.named(answer, station, key_id)

    async def _upload(
        self, form: Form, file: IO[bytes], place: Place, caller: Caller, request_id: str
    ) -> tuple[Station, dict[str, Any]]:
        """Ask the replicas of a place in turn, until one takes a connection. Raises PenstockError."""
        door = self._door
        now = door.monotonic()
        stations = sorted(
            door.stations.of(place), key=lambda each: (each.health.weight(now) <= 0, each.in_flight)
        )
        for station in stations:
            # aiohttp closes what it has sent
            copy = _again(file)
            data = aiohttp.FormData(quote_fields=False)
            for name, value in form.fields.items():
                if name not in ("model", "target_model_names"):
                    data.add_field(name, value)
            data.add_field("file", copy, filename=form.filename, content_type=form.content_type)
            station.in_flight += 1
            try:
                with self._shared.told(station, {}):
                    headers = self._shared.headers(request_id, station, caller)
                    timeout = self._limits.timeout
                    try:
                        answer = await ask(
                            station, "POST", "/v1/files", data=data, headers=headers, timeout=timeout
                        )
                        return station, answer
                    except Missing:
                        raise Failed(Attempt("invalid", 404), "has no /v1/files") from None
                    except Failed as error:
                        if error.attempt.fault != "connect" or station is stations[-1]:
                            raise
            finally:
                station.in_flight -= 1
                copy.close()
        raise NoReplica(f"Nobody serves {place.name} now.", retry_after=5)


def _content_headers(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    kind = response.content_type or "application/octet-stream"
    fields = [(b"content-type", kind.encode("latin-1", "replace")), (b"x-content-type-options", b"nosniff")]
    length = response.headers.get("content-length", "")
    if length.isdecimal() and "content-encoding" not in response.headers:
        fields.append((b"content-length", length.encode()))
    return fields


def _again(file: IO[bytes]) -> IO[bytes]:
    """The same file, once more from its beginning."""
    file.flush()
    copy = os.fdopen(os.dup(file.fileno()), "rb")
    copy.seek(0)
    return copy


async def _forget(station: Station, id: str) -> None:
    try:
        await ask(station, "DELETE", f"/v1/files/{id}")
    except (Failed, Missing, PenstockError):
        pass
