"""One HTTP exchange in plain ASGI: read a bounded body, answer once, notice that the client has left.

It knows ASGI messages and bytes; it knows neither JSON schemas nor the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, PayloadTooLarge

_DISCARD = 8
"""How many times the limit of an oversized body is read and dropped, so that the client gets to read the 413
(closing on a client that still sends loses the answer)."""


class UnsupportedMediaType(InvalidRequest):
    """The body is declared to be something else than JSON, or encoded."""

    status = 415
    code = "unsupported_media_type"


class ClientGone(Exception):
    """The client has closed the connection: nobody reads an answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """Value of a request header (`name` in lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole request body, said to be JSON if anything is said.

    Raises UnsupportedMediaType, PayloadTooLarge over `limit` bytes, and ClientGone.
    """
    media = (header(scope, b"content-type") or "application/json").split(";")[0].strip().lower()
    if not (media == "application/json" or media.endswith("+json")):
        # also keeps browsers from posting here without asking first (CORS)
        raise UnsupportedMediaType(
            f"The body is declared as {media}.", advice="Send `Content-Type: application/json`."
        )
    encoding = (header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"The body is declared as encoded with {encoding}, which this server does not decode.",
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


async def respond(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: bytes = b"application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a whole response."""
    fields = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    for name, value in (headers or {}).items():
        fields.append((name.lower().encode("latin-1"), value.encode("latin-1", "replace")))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it when the client disconnects. The body must have been read.

    Cancelling is how a request leaves the engine: the generator that feeds `work` aborts it on its way out.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not worker.done():
            worker.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
    if not worker.cancelled():
        worker.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int, size: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request body of {size} bytes (or more) is over the limit of {limit} bytes.",
        advice="The server's limit is set by --max-body-bytes.",
    )
