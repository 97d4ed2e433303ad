"""A request's body as the gateway sees it: a few fields, and raw bytes for all the rest.

    {"model": "small", "messages": <raw>, "max_tokens": 9000, "stream": true}
        ──read──▶ model, stream, cap …   ──write(place)──▶ the same with another model, cap and cache_salt

Values that the gateway does not write are relayed byte by byte; a key that stands twice is sent once, with
its last value, so that nobody reads another one than the gateway did.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from penstock.core.errors import InvalidRequest, UnsupportedParameter, brief, quote
from penstock.http.body import NotJson, parse_json
from penstock.spec.routes import TokenCap

from .endpoints import Endpoint
from .policy.price import Used
from .policy.routes import Place

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_TEMPLATE = 256
"""Tokens that a chat template may add beyond one for each byte of the body."""
_MARKS = 8
"""Tokens between two texts that are compared."""
_ELSEWHERE = re.compile(
    rb'"(?:image|image_url|input_image|video|video_url|audio_url|file|file_id|input_file|document|item_reference)"'
)
"""What says in messages that something is not in them. In their texts quotes have a backslash."""
BACKGROUND = 1_000_000
"""What a request of that class has as its `priority` at least, and no other; the largest is served last."""
UNBOUNDED = 32_768
"""Tokens of an answer that are reckoned with where neither request, route nor context bounds them."""
_FILE_TYPES = ("input_file", "input_image", "file", "container_upload")
"""Types of contents that may be files of an upstream's account."""
_MOST_SEEN = 50_000
"""Values that are looked at for ids of files, in some 20 ms."""
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|[67])")
_LETTERS = [
    (b"\\u00" + digits, bytes([code]))
    for code in (0x5F, *range(0x61, 0x7B))
    for digits in {b"%02x" % code, b"%02X" % code}
]
_MOST = (1 << 31) - 1
_NOTHING = frozenset({b"null", b"false", b"[]", b"{}", b'{"type":"text"}', b'{"type": "text"}'})
"""Values with which a field asks for nothing; the last two of `response_format`."""


class Envelope:
    """One body. Raises InvalidRequest, naming the field, where one that the gateway reads is wrong."""

    def __init__(self, body: bytes, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.size = len(body)
        self._fields = _read(body)
        self.model: str = self._value("model", str, "a string") or ""
        if not self.model:
            raise InvalidRequest("The field model is required.", param="model")
        self.stream = endpoint.streams and bool(self._value("stream", bool, "true or false"))
        self.cap: int | None = None
        self._cap_field = endpoint.cap
        for name in endpoint.caps:
            given = self._value(name, int, "an integer")
            if given is not None:
                if not 0 <= given <= _MOST:
                    raise InvalidRequest(f"{name} must be from 0 to {_MOST}, got {quote(given)}.", param=name)
                self.cap, self._cap_field = int(given), name
                break
        self.priority = int(self._value("priority", int, "an integer") or 0)
        if not 0 <= self.priority < BACKGROUND:
            # lower is served first: nobody goes before others by saying so
            raise InvalidRequest(
                f"priority must be from 0 to {BACKGROUND - 1}, got {quote(self.priority)}.", param="priority"
            )
        self.choices = self._choices() if endpoint.caps else 1
        self._elsewhere = False
        """Whether the prompt says that a part of it is somewhere else."""
        self._refuse_files()
        self.usage_wanted = True
        """Whether the client sees the usage of a stream."""
        if endpoint.usage_option and self.stream:
            options = self._value("stream_options", dict, "an object") or {}
            self._options: dict[str, Any] = options
            self.usage_wanted = (
                options.get("include_usage") is True
            )  # "false" is none: servers read texts, too

    @property
    def prompt(self) -> bytes:
        """What prefixes are taken of."""
        return bytes(self._fields.get(self.endpoint.prompt, b""))

    def limit(self, cap: TokenCap) -> None:
        """Apply a route's ceiling and default to the tokens that may be generated."""
        if not self.endpoint.caps:
            return
        default = cap.ceiling if cap.default is None else cap.default
        if self.cap is None:
            if default is not None:
                self._write_cap(default)
        elif cap.ceiling is not None and self.cap > cap.ceiling:
            self._write_cap(cap.ceiling)
        else:  # of several, servers do not agree which one counts
            for name in self.endpoint.caps:
                if name != self._cap_field:
                    self._fields.pop(name, None)

    def worst(self, context: int | None) -> Used:
        """Most tokens that it can use, of a model with so long a context.

        A token is at least one byte of the body, whatever the tokenizer, but for what a template adds, and
        for what stands elsewhere: earlier answers, images. A context bounds each of several prompts.
        """
        prompt, prompts = self.size + _TEMPLATE, 1
        if self.endpoint.pairs:
            repeated, prompts = self._pairs()
            prompt += repeated
        elif self.endpoint.lists:
            prompts, templated = self._listed()
            prompt += _TEMPLATE * max(templated - 1, 0)
        if self.endpoint.caps and self._points_elsewhere():
            prompt = max(prompt, (UNBOUNDED if context is None else context) * prompts)
        if context is not None:
            prompt = min(prompt, context * prompts)
        if not self.endpoint.caps:
            return Used(input=prompt)
        cap = self.cap
        if cap is None:
            cap = UNBOUNDED if context is None else context
        if context is not None:
            cap = min(cap, context)
        return Used(input=prompt, output=cap * self.choices)

    def write(
        self, place: Place, salt: str | None, generated: bytes | None = None, *, background: bool = False
    ) -> bytes:
        """The body for a place.

        Args:
            salt: separates cached prefixes, for engines that know `cache_salt`; the client's own is dropped.
            generated: JSON list of the tokens behind which the answer is to go on.
            background: nobody waits for it; where priorities count, it goes behind all others.
        """
        fields: dict[str, Any] = dict(self._fields)
        fields["model"] = place.model
        fields.pop("cache_salt", None)
        if salt and place.kind in ("penstock", "vllm") and self.endpoint.metered:
            fields["cache_salt"] = salt
        if self.endpoint.usage_option and self.stream and not self.usage_wanted:
            fields["stream_options"] = {**self._options, "include_usage": True}
        if background and place.priorities:
            fields["priority"] = self.priority + BACKGROUND
        if generated is not None:
            fields["generated_token_ids"] = msgspec.Raw(generated)
        return msgspec.json.encode(fields)

    def raw(self, name: str) -> bytes:
        """A field as it came; empty where it is not given."""
        return bytes(self._fields.get(name, b""))

    def text(self, name: str) -> str | None:
        """A field that is a text. Raises InvalidRequest where it is none."""
        value: str | None = self._value(name, str, "a string")
        return value

    def entries(self, name: str) -> list[Any]:
        """A field that is a list; empty if it is not there. Raises InvalidRequest where it is none."""
        value: list[Any] | None = self._value(name, list, "a list")
        return value or []

    def put(self, name: str, value: Any) -> None:
        """Write a field."""
        self._fields[name] = msgspec.Raw(msgspec.json.encode(value))

    def copy(self) -> Envelope:
        """One that changes by itself."""
        twin = copy.copy(self)
        twin._fields = dict(self._fields)
        return twin

    def asks_for(self, names: Iterable[str]) -> bool:
        """Whether one of these fields asks for something."""
        return any(bytes(self._fields.get(name, b"null")) not in _NOTHING for name in names)

    def refuse(self, names: Iterable[str]) -> None:
        """Raise UnsupportedParameter for the first of these fields that asks for something."""
        for name in names:
            if bytes(self._fields.get(name, b"null")) not in (b"null", b"false"):
                raise UnsupportedParameter(f"{name} is not supported by this gateway.", param=name)

    def _write_cap(self, cap: int) -> None:
        for name in self.endpoint.caps:
            self._fields.pop(name, None)
        self.cap = cap
        self._fields[self._cap_field] = msgspec.Raw(str(cap).encode())

    def _choices(self) -> int:
        n = self._value("n", int, "an integer") or 1
        best_of = self._value("best_of", int, "an integer") or 1
        count = max(n, best_of)
        if not 1 <= count <= 4096:
            raise InvalidRequest(f"n must be from 1 to 4096, got {quote(count)}.", param="n")
        # a list of prompts is as many requests, and a prompt takes a byte and a comma at least
        return count * self._listed()[0] if self.endpoint.lists else count

    def _pairs(self) -> tuple[int, int]:
        """Of texts that are compared with each of a list: the tokens of all repetitions, and how many."""
        lists = [bytes(raw) for raw in self._fields.values() if bytes(raw)[:1] == b"["]
        pairs = max((len(_LIST.decode(raw)) for raw in lists), default=1) or 1
        return pairs * (self.size - sum(map(len, lists)) + _MARKS), pairs

    def _listed(self) -> tuple[int, int]:
        """How many prompts there are, and how many of them something is written around."""
        endpoint = self.endpoint
        plain, others = (
            sum(
                _prompts(bytes(self._fields[name]), endpoint.starts) for name in names if name in self._fields
            )
            for names in ((endpoint.prompt,), endpoint.others)
        )
        return max(1, plain + others), others + (plain if endpoint.templated else 0)

    def _points_elsewhere(self) -> bool:
        """Whether a prompt is longer than its bytes: it continues something, or has images or files."""
        return self._elsewhere or self.asks_for(("previous_response_id",))

    def _refuse_files(self) -> None:
        """All keys share the upstream's account: an id of a file there is good for everybody who knows it."""
        for name in (self.endpoint.prompt, "tools") if self.endpoint.caps else ():
            raw = _without_escapes(bytes(self._fields.get(name, b"")))
            if name != "tools":
                self._elsewhere = _ELSEWHERE.search(raw) is not None
            if (b'"file_id"' in raw or b'"file_ids"' in raw) and (
                raw.count(b"{") + raw.count(b"[") > _MOST_SEEN or _has_file(decoded(raw))
            ):
                raise UnsupportedParameter(
                    f"file_id in {name} is not supported by this gateway: send the file itself.", param=name
                )

    def _value(self, name: str, kind: type, what: str) -> Any:
        raw = self._fields.get(name)
        if raw is None:
            return None
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, RecursionError):  # it is JSON, but with a number that no float can hold
            raise InvalidRequest(f"{name} must be {what}, got a number out of range.", param=name) from None
        if value is None:
            return None
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidRequest(f"{name} must be {what}, got {quote(value)}.", param=name)
        return value


def _without_escapes(raw: bytes) -> bytes:
    """The same with letters as such, so that no name can hide; they are never escaped by accident."""
    if _ESCAPED_LETTER.search(raw):
        for escape, letter in _LETTERS:
            raw = raw.replace(escape, letter)
    return raw


def decoded(raw: bytes) -> Any:
    """A value of a body. Raises InvalidRequest for a number that no float can hold."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _invalid(brief(str(error))) from None


def _has_file(value: Any) -> bool:
    """Whether contents of messages, or tools, are files by their ids. Citations have such ids as well, and
    arguments of tools are whatever their authors want. Of what is too much to look at it is said, too."""
    left, seen = [value], 0
    while left:
        each, seen = left.pop(), seen + 1
        if seen > _MOST_SEEN:
            return True
        if isinstance(each, list):
            left += each
        elif isinstance(each, dict) and each.get("type") != "tool_use":
            left += each.values()
            file, container = each.get("file"), each.get("container")
            if each.get("type") in _FILE_TYPES and (each.get("file_id") or _says(file, "file_id")):
                return True
            if _says(container, "file_ids"):
                return True
    return False


def _says(value: Any, name: str) -> bool:
    return isinstance(value, dict) and bool(value.get(name))


def _prompts(raw: bytes, starts: bytes) -> int:
    """How many prompts a list holds: entries that begin with one of `starts`; all others together are one."""
    if raw[:1] != b"[":
        return 1
    entries = _LIST.decode(raw)
    return max(1, sum(bytes(entry)[:1] in starts for entry in entries))


def _read(body: bytes) -> dict[str, Any]:
    try:
        body.decode()
        fields: dict[str, Any] = _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # the same words as the engine's server: it says where it breaks
        try:
            value = parse_json(body)
        except NotJson as why:
            raise _invalid(str(why)) from None
        if not isinstance(value, dict):
            raise _invalid("it must be an object") from None
        return {name: msgspec.Raw(msgspec.json.encode(each)) for name, each in value.items()}
    return fields


def _invalid(why: str) -> InvalidRequest:
    error = InvalidRequest(f"The request body cannot be read as JSON: {why}.")
    error.code = "invalid_json"
    return error
