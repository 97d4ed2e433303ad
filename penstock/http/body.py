"""The body of a request: read within bounds, and the JSON object in it.

It knows media types, sizes and JSON; it does not know which fields an object may have.
"""

from __future__ import annotations

import re
from array import array
from itertools import accumulate
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from penstock.core.errors import InvalidRequest, PayloadTooLarge, quote

from .exchange import ClientGone, header

_DISCARD = 8
"""How many times the limit of an oversized body is read and dropped, so that the client gets to read the 413
(closing on a client that still sends loses the answer)."""

MAX_DEPTH = 64
"""Most arrays and objects within one another, as in .NET's System.Text.Json. Whatever walks a value later, by
recursion (converting, copying, a template's tojson), stays far below Python's limit of 1,000 calls."""


class UnsupportedMediaType(InvalidRequest):
    """The body is declared to be something else than JSON, or encoded."""

    status = 415
    code = "unsupported_media_type"


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole request body, said to be JSON if anything is said.

    Raises UnsupportedMediaType, PayloadTooLarge over `limit` bytes, and ClientGone.
    """
    media = (header(scope, b"content-type") or "application/json").split(";")[0].strip().lower()
    if not (media == "application/json" or media.endswith("+json")):
        # also keeps browsers from posting here without asking first (CORS)
        raise UnsupportedMediaType(
            f"The body is declared as {quote(media)}.", advice="Send `Content-Type: application/json`."
        )
    encoding = (header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"The body is declared as encoded with {quote(encoding)}, which this server does not decode.",
            advice="Send it without Content-Encoding.",
        )
    declared = header(scope, b"content-length")
    announced = int(declared) if declared is not None and declared.isdecimal() else 0
    if announced > limit and header(scope, b"expect") is not None:
        raise _too_large(limit, announced)  # the client waits for our word before it sends
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if max(size, announced) <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        if not message.get("more_body", False):
            break
        if size > _DISCARD * limit:
            raise _too_large(limit, size)
    if max(size, announced) > limit:
        raise _too_large(limit, max(size, announced))
    return b"".join(chunks)


class NotJson(ValueError):
    """Why a text cannot be read as JSON: a clause whose subject is "it"."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises InvalidRequest, saying where it breaks."""
    try:
        value = parse_json(body)
        if not isinstance(value, dict):
            raise NotJson(f"it must be an object, got {_json_type(value)}")
    except NotJson as why:
        error = InvalidRequest(f"The request body cannot be read as JSON: {why}.")
        error.code = "invalid_json"
        raise error from None
    return value


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`, which may nest up to MAX_DEPTH arrays and objects. Raises NotJson.

    Everything that comes from a client is read here, also JSON in a string of its JSON.
    """
    try:
        text = data.decode("utf-8-sig")  # some editors and .NET clients write a byte order mark
    except UnicodeDecodeError as error:
        raise NotJson(f"it is not valid UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise NotJson("it is empty")
    if _too_deep(data):
        raise NotJson(f"it is nested too deeply, over {MAX_DEPTH} levels")
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        # msgspec calls a half pair at the end of a text "truncated"
        if ("surrogate" in str(error) or "truncated" in str(error)) and (half := _HALF_PAIR.search(text)):
            raise NotJson(
                f"it has the escape {half[0]} without its other half; such a surrogate is no character"
            ) from None
        raise NotJson(str(error)) from None


_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""One level down and one up, as signed bytes."""
_OTHERS = bytes(set(range(256)) - set(b"[{]}"))


def _too_deep(data: bytes) -> bool:
    """Whether arrays and objects nest over MAX_DEPTH, before the first place where `data` is no JSON, if any.

    Nothing recurses, and no loop runs in Python: it takes a third of the time that decoding takes.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    steps = array("b", outside_strings(without_escapes(data)).translate(_STEPS, _OTHERS))
    return any(map(MAX_DEPTH.__lt__, accumulate(steps)))


def without_escapes(data: bytes) -> bytes:
    """JSON without the escapes that could hide where its strings end."""
    return data.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in data else data


def outside_strings(bare: bytes) -> bytes:
    """What stands outside of all strings of JSON that has no such escapes."""
    return b"".join(bare.split(b'"')[::2])


_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF_PAIR = re.compile(rf"{_HIGH}(?!{_LOW})|(?<!\\u[dD][89abAB][0-9a-fA-F]{{2}}){_LOW}")


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _too_large(limit: int, size: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request body of {size} bytes (or more) is over the limit of {limit} bytes.",
        advice="The server's limit is set by --max-body-bytes.",
    )
