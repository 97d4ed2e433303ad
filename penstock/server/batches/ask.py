"""Asking an application of this process, without a connection: what a line of a batch goes through is what a
request over HTTP goes through.

It knows ASGI; it knows no endpoint.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    request_id: str
    retry_after: float | None = None
    """Seconds."""


async def ask(app: ASGIApp, path: str, body: bytes, **said: Any) -> Answer:
    """POST a JSON body. `said`: more of the scope, such as whose request it is; `headers` are added."""
    headers = [(b"content-type", b"application/json"), *said.pop("headers", ())]
    request_id = uuid.uuid4().hex
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [*headers, (b"x-request-id", request_id.encode())],
        "client": None,
        "server": None,
        **said,
    }
    left = [{"type": "http.request", "body": body, "more_body": False}]
    begun: Message = {}
    pieces: list[bytes] = []

    async def receive() -> Message:
        if left:
            return left.pop()
        await asyncio.Event().wait()  # nobody leaves
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal begun
        if message["type"] == "http.response.start":
            begun = message
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    task = asyncio.current_task()
    if task is not None and task.cancelling():  # which the application has made an answer of
        raise asyncio.CancelledError
    found = dict(begun.get("headers", ()))
    after = found.get(b"retry-after", b"").decode("latin-1")
    return Answer(
        begun.get("status", 500), b"".join(pieces), request_id, float(after) if after.isdecimal() else None
    )
