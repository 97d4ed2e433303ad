"""The input of a batch: one request a line, as its upstream is to see it.

    {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "small", …}}
        ──▶ the same with the upstream's model, the route's caps, the key's cache_salt; and its worst case

All lines are for one route, one endpoint and one upstream. A line is held at a time, and some of those beside
it; what is wrong with one is told with its number.
"""

from __future__ import annotations

import asyncio
from typing import IO, TYPE_CHECKING, NoReturn

import msgspec

from penstock.core.errors import InvalidRequest, PayloadTooLarge, PenstockError, quote
from penstock.gateway import hosted
from penstock.gateway.endpoints import ENDPOINTS, Endpoint
from penstock.gateway.envelope import Envelope
from penstock.gateway.hooks import told
from penstock.gateway.policy.price import Used
from penstock.gateway.policy.routes import Forbidden, Place, Way
from penstock.http.body import parse_object
from penstock.spec.model import Files, Spec

from .common import tenant

if TYPE_CHECKING:
    from penstock.gateway.door import Door
    from penstock.gateway.request import Caller

_NO_LINES = ("/pooling", "/classify", "/v1/chat/completions/batch")
BATCHED = {each.path: each for each in ENDPOINTS if each.metered and each.path not in _NO_LINES}
"""Endpoints of which batches are made: those of an engine's own batches."""
_PIECE = 64 << 10
"""Bytes of lines that are dealt with before others get a turn."""
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MOST_NAMES, _LONGEST_NAME = 64, 128
_MOST_TAGS, _MOST_NOTES = 32, 8
"""Of the hooks, over all lines."""
_REFUSED = ("previous_response_id",)
"""Fields that lead to what one replica has, and a batch cannot be sent after."""


class Contents(msgspec.Struct, kw_only=True):
    """What is known of a batch's input: where it goes, and what its lines may use together at most."""

    route: str = ""
    names: list[str] = []
    """Models as the lines name them: the route and its aliases, or what a match takes (64 of them)."""
    upstream: str = ""
    model: str = ""
    """What the upstream calls it."""
    endpoint: str = ""
    lines: int = 0
    input: int = 0
    output: int = 0
    """Tokens."""
    tags: dict[str, str] = {}
    """Of hooks."""
    notes: list[str] = []
    """What hooks did."""

    @property
    def worst(self) -> Used:
        """Most tokens of all lines together."""
        return Used(self.input, self.output)


class NoFiles(InvalidRequest):
    """None of those who would serve a request takes files."""

    code = "no_files"


def place_of(spec: Spec, way: Way, local_only: bool) -> Place:
    """Where files of a route go: its first target, or fallback, at an upstream that takes files. Raises
    NoFiles; Forbidden where it may not leave the house."""
    targets, fallback = way.places(local_only)
    for place in (*targets, *fallback):
        if not place.local and spec.upstreams[place.name].files:
            return place
    raise NoFiles(
        f"{way.name} leads to no upstream that takes files.",
        param="model",
        advice="In penstock.yaml, an upstream that has /v1/files says `files: true`.",
    )


class Lines:
    """Reads the lines of one upload."""

    def __init__(self, door: Door, caller: Caller, request_id: str, limits: Files) -> None:
        self._door = door
        self._caller = caller
        self._id = request_id
        self._limits = limits
        self._way: Way | None = None
        self._endpoint: Endpoint | None = None
        self._known: set[str] = set()
        """Names that lead there."""
        self.place: Place | None = None
        self.contents = Contents()

    async def rewrite(self, source: IO[bytes], target: IO[bytes]) -> Contents:
        """Write to `target` what the upstream is to get, and go to its beginning. Raises PenstockError, with
        the line's number."""
        number, out = 0, bytearray()
        while lines := await asyncio.to_thread(self._some, source, number):
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                try:
                    out += await self._line(line) + b"\n"
                except PenstockError as error:
                    _at(number, error)
            await asyncio.to_thread(target.write, bytes(out))
            out.clear()
        if not self.contents.lines:
            raise InvalidRequest("The file has no requests.", param="file")
        await asyncio.to_thread(target.seek, 0)
        return self.contents

    def _some(self, source: IO[bytes], number: int) -> list[bytes]:
        """The next lines."""
        lines: list[bytes] = []
        size, most = 0, self._limits.max_line_bytes
        while size < _PIECE and (line := source.readline(most + 2)):
            if len(line.rstrip(b"\r\n")) > most:
                raise PayloadTooLarge(
                    f"Line {number + len(lines) + 1} of the file is over the limit of {most} bytes.",
                    param="file",
                    advice="The gateway's limit is gateway.files.max_line_bytes.",
                )
            if number + len(lines) == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as editors write it
            lines.append(line)
            size += len(line)
        return lines

    async def _line(self, line: bytes) -> bytes:
        contents = self.contents
        if contents.lines == self._limits.max_lines:
            raise PayloadTooLarge(
                f"It is over the limit of {contents.lines} requests.",
                advice="The gateway's limit is gateway.files.max_lines.",
            )
        fields = _fields(line)
        if (method := _text(fields, "method")) != "POST":
            raise InvalidRequest(f"method must be POST, got {quote(method)}.", param="method")
        _text(fields, "custom_id")
        endpoint = self._same_endpoint(_text(fields, "url"))
        if "body" not in fields:
            raise InvalidRequest("body is required.", param="body")
        envelope = self._envelope(bytes(fields["body"]), endpoint)
        place = self._same_place(envelope.model)
        envelope = await self._seen_by_hooks(envelope, endpoint)
        assert self._way is not None
        hosted.check(envelope, self._way)
        route = self._way.route
        envelope.limit(route.max_tokens)
        known = [each for each in (route.context, place.context) if each is not None]
        worst = envelope.worst(min(known) if known else None)
        contents.lines += 1
        contents.input += worst.input
        contents.output += worst.output
        fields["body"] = msgspec.Raw(envelope.write(place, tenant(self._caller)))
        return msgspec.json.encode(fields)

    def _envelope(self, body: bytes, endpoint: Endpoint) -> Envelope:
        envelope = Envelope(body, endpoint)
        envelope.refuse((*endpoint.refused, *_REFUSED))
        if envelope.stream:
            raise InvalidRequest("A batch has no streams.", param="stream", advice="Leave stream out.")
        return envelope

    def _same_endpoint(self, url: str) -> Endpoint:
        endpoint = BATCHED.get(url)
        if endpoint is None:
            raise InvalidRequest(f"url must be one of {', '.join(BATCHED)}, got {quote(url)}.", param="url")
        if self._endpoint is None:
            self._endpoint = endpoint
            self.contents.endpoint = url
        if endpoint is not self._endpoint:
            raise InvalidRequest(
                f"url is {url}, and was {self._endpoint.path} before: a batch has one endpoint.",
                param="url",
            )
        return endpoint

    def _same_place(self, model: str) -> Place:
        """Where this model's requests go, which is where all others of the file go. Raises ModelNotFound,
        Forbidden, InvalidRequest."""
        contents, caller = self.contents, self._caller
        if self.place is not None and model in self._known:
            return self.place
        principal = caller.principal
        way = self._door.book.find(model, caller.headers, caller.tags, principal.team, principal.routes)
        if self._way is not None and way.name != self._way.name:
            raise InvalidRequest(
                f"It is for {quote(model)}, and those before it for {contents.route}: a batch has one model.",
                param="model",
                advice="Upload a file for each.",
            )
        if self.place is None:
            if self._door.hooks.wants("after", way.name):
                raise Forbidden(
                    f"The answers of {way.name} are looked at by hooks, and those of a batch cannot be."
                )
            self._way = way
            self.place = place_of(self._door.spec, way, caller.local_only)
            contents.route, contents.upstream, contents.model = way.name, self.place.name, self.place.model
        if len(self._known) < _MOST_NAMES and len(model) <= _LONGEST_NAME:  # a match takes any name
            self._known.add(model)
            contents.names = sorted(self._known)
        return self.place

    async def _seen_by_hooks(self, envelope: Envelope, endpoint: Endpoint) -> Envelope:
        """The request as hooks have made it. Raises their refusal."""
        door, caller, contents = self._door, self._caller, self.contents
        assert self.place is not None
        assert self._way is not None
        if not door.hooks.wants("before", contents.route):
            return envelope
        owner = (caller.principal.key_id, caller.principal.team, caller.tags)
        body = parse_object(envelope.write(self.place, None)) | {"model": envelope.model}
        about = told(self._id, endpoint.path, contents.route, owner, body)
        stays = door.stays(self._way, caller)
        verdict = await door.hooks.ask("before", contents.route, about, "body", stays)
        if verdict.refusal is not None:
            raise verdict.refusal
        if door.book.tags_local_only(verdict.tags) and not self.place.in_house:
            raise Forbidden(
                "A hook has given it a tag that is local_only, and the upstream is not in the house."
            )
        if len(contents.tags) < _MOST_TAGS:
            contents.tags |= verdict.tags
        new = [note for note in verdict.notes if note not in contents.notes]
        contents.notes += new[: max(0, _MOST_NOTES - len(contents.notes))]
        if verdict.instead is None:
            return envelope
        return self._envelope(msgspec.json.encode({**verdict.instead, "model": envelope.model}), endpoint)


def _at(number: int, error: PenstockError) -> NoReturn:
    """Raise an error of one line, which says so."""
    error.message = f"Line {number} of the file: {error.message}"
    error.args = (error.message,)
    raise error


def _fields(line: bytes) -> dict[str, msgspec.Raw]:
    try:
        line.decode()
        fields: dict[str, msgspec.Raw] = _FIELDS.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # says where it breaks
        return {name: msgspec.Raw(msgspec.json.encode(each)) for name, each in parse_object(line).items()}
    return fields


def _text(fields: dict[str, msgspec.Raw], name: str) -> str:
    value = msgspec.json.decode(fields.get(name, b"null"))
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, got {quote(value)}.", param=name)
    return value
