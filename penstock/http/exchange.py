"""One HTTP exchange in plain ASGI: look at a header, answer once, notice that the client has left.

It knows ASGI messages and bytes; `body` reads what the client sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

JSON = b"application/json"


class ClientGone(Exception):
    """The client has closed the connection: nobody reads an answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """Value of a request header (`name` in lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


async def respond(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: bytes = JSON,
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
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal gone
        gone = True
        task.cancel()  # it stands in `work`, or this would not be called any more

    watcher = asyncio.ensure_future(_disconnected(receive))
    watcher.add_done_callback(leave)
    try:
        await work
    except asyncio.CancelledError:
        if not gone or task.uncancel():  # somebody else wants it: the server ends
            raise
    finally:
        watcher.remove_done_callback(leave)
        watcher.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
