"""/v1/files and /v1/batches, in OpenAI's shapes.

What is there belongs to the key, or the tenant, that made it: others get a 404.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any
from uuid import uuid4

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, RouteNotFound, UnsupportedParameter, quote
from penstock.http.body import parse_object
from penstock.http.exchange import respond
from penstock.http.form import read_form
from penstock.http.lists import Query, page_of
from penstock.server.behalf import owner_of
from penstock.server.items import field, typed
from penstock.server.pipeline import whole_body
from penstock.server.state import State

from .desk import Desk
from .store import File
from .worker import LIVE

_PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST = 30 * 86_400
"""Seconds of a completion window, and of a file's life."""
_SHORTEST_LIFE = 3600
FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
"""Of POST /v1/batches."""
_PIECE = 1 << 18
"""Bytes of a file that are sent at once."""


class NotThere(RouteNotFound):
    """There is no such file or batch, or it is somebody else's."""

    code = "not_found"


def _desk(state: State) -> Desk:
    if state.batches is None:
        raise RouteNotFound(
            "This server keeps no files and no batches.",
            advice="Start it with --batch-dir, and with one API process; `penstock run-batch` needs neither.",
        )
    return state.batches


# ---- files ----


async def upload(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Keep a file."""
    desk, owner = _desk(state), owner_of(scope)
    folder = desk.store.contents
    form = await read_form(scope, receive, desk.most_bytes, folder, limit="--max-file-bytes")
    with form.file:
        purpose = form.fields["purpose"]
        if purpose not in _PURPOSES:
            raise InvalidRequest(
                f"purpose must be one of {', '.join(_PURPOSES)}, got {quote(purpose)}.", param="purpose"
            )
        now = int(state.wall())
        life = form.fields.get("expires_after[seconds]")
        if life is not None and not (life.isdecimal() and _SHORTEST_LIFE <= int(life[:9]) <= _LONGEST):
            raise InvalidRequest(
                f"expires_after[seconds] must be from {_SHORTEST_LIFE} to {_LONGEST}, got {quote(life)}.",
                param="expires_after",
            )
        file = File(
            id=f"file-{uuid4().hex}",
            owner=owner,
            purpose=purpose,
            filename=form.filename,
            bytes=form.size,
            created_at=now,
            expires_at=None if life is None else now + int(life),
        )
        await asyncio.to_thread(desk.store.delete_expired, now)
        await asyncio.to_thread(desk.store.add_file, file, form.file)
    await respond(send, encode(file.told()))


async def list_files(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The caller's files, page by page."""
    desk, owner = _desk(state), owner_of(scope)
    query = Query(scope, ("after", "limit", "order", "purpose"))
    most, after = query.limit(10_000, 10_000), query.text("after")
    number = None if after is None else (await _file(state, desk, after, owner)).number
    found = await asyncio.to_thread(
        desk.store.files,
        owner,
        state.wall(),
        after=number,
        oldest=query.oldest_first(),
        most=most + 1,
        purpose=query.text("purpose"),
    )
    await respond(send, encode(page_of([each.told() for each in found[:most]], len(found) > most)))


async def get_file(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """What is known of a file."""
    file = await _file(state, _desk(state), scope["path_params"]["name"], owner_of(scope))
    await respond(send, encode(file.told()))


async def delete_file(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Forget a file, unless a batch reads it."""
    desk, id = _desk(state), scope["path_params"]["name"]
    await _file(state, desk, id, owner_of(scope))
    if await asyncio.to_thread(desk.store.uses, id):
        raise InvalidRequest(
            "The file is the input of a batch that goes on.",
            param="file_id",
            advice="Cancel the batch first.",
        )
    await asyncio.to_thread(desk.store.delete_file, id)
    await respond(send, encode({"id": id, "object": "file", "deleted": True}))


async def content(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """A file's content."""
    desk = _desk(state)
    file = await _file(state, desk, scope["path_params"]["name"], owner_of(scope))
    with (desk.store.contents / file.id).open("rb") as opened:
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(file.bytes).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while piece := await asyncio.to_thread(opened.read, _PIECE):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _file(state: State, desk: Desk, id: str, owner: str) -> File:
    found = await asyncio.to_thread(desk.store.file, id, owner, state.wall())
    if found is None:
        raise NotThere(f"No such File object: {quote(id)}.", param="id")
    return found


# ---- batches ----


async def create(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Begin a batch of requests that nobody waits for."""
    desk, owner = _desk(state), owner_of(scope)
    given = parse_object(await whole_body(state, scope, receive))
    for name in given.keys() - FIELDS:
        raise UnsupportedParameter(f"{quote(name)} is not supported by this server.", param=name)
    endpoint = _field(given, "endpoint", str)
    if endpoint not in desk.worker.urls:
        raise InvalidRequest(
            f"endpoint must be one of {', '.join(desk.worker.urls)}, got {quote(endpoint)}.", param="endpoint"
        )
    window = _field(given, "completion_window", str)
    parts = _WINDOW.fullmatch(window)
    if parts is None or (seconds := int(parts[1]) * _SECONDS[parts[2]]) > _LONGEST:
        raise InvalidRequest(
            f"completion_window must be a time such as 24h, at most 30d, got {quote(window)}.",
            param="completion_window",
        )
    metadata = given.get("metadata")
    if metadata is not None and (
        not isinstance(metadata, dict)
        or len(metadata) > 16
        or any(not isinstance(each, str) or len(each) > 512 for each in metadata.values())
    ):
        raise InvalidRequest(
            "metadata must be an object of at most 16 texts, of up to 512 characters each.", param="metadata"
        )
    file = await _file(state, desk, _field(given, "input_file_id", str), owner)
    if file.purpose != "batch":
        raise InvalidRequest(
            f"The file's purpose must be batch, got {quote(file.purpose)}.", param="input_file_id"
        )
    now = int(state.wall())
    told: dict[str, Any] = {
        "id": f"batch_{uuid4().hex}",
        "object": "batch",
        "endpoint": endpoint,
        "model": state.model_name,
        "errors": None,
        "input_file_id": file.id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + seconds,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": metadata,
    }
    if (life := given.get("output_expires_after")) is not None:
        told["output_expires_after"] = _life(life)
    await asyncio.to_thread(desk.store.save, told, owner, live=True)
    answer = encode(told)
    desk.worker.begin(told, owner)
    await respond(send, answer)


async def list_batches(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The caller's batches, page by page, the latest first."""
    desk, owner = _desk(state), owner_of(scope)
    query = Query(scope, ("after", "limit"))
    most, after = query.limit(20, 100), query.text("after")
    number = None
    if after is not None:
        stored = await asyncio.to_thread(desk.store.batch, after, owner)
        if stored is None:
            raise _no_batch(after)
        number = stored.number
    found = await asyncio.to_thread(desk.store.batches, owner, after=number, most=most + 1)
    data = [desk.worker.told.get(each.told["id"], each.told) for each in found[:most]]
    await respond(send, encode(page_of(data, len(found) > most)))


async def get_batch(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """How far a batch is."""
    await respond(send, encode(await _batch(_desk(state), scope)))


async def cancel(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Ask nothing more of a batch. What was answered is in its output."""
    desk = _desk(state)
    told = await _batch(desk, scope)
    if told["status"] not in LIVE:
        raise InvalidRequest(f"The batch is {told['status']}: it cannot be cancelled.", param="batch_id")
    if told["id"] in desk.worker.told:
        await desk.worker.cancel(told["id"], owner_of(scope))
    await respond(send, encode(told))


async def _batch(desk: Desk, scope: Scope) -> dict[str, Any]:
    id = scope["path_params"]["name"]
    stored = await asyncio.to_thread(desk.store.batch, id, owner_of(scope))
    if stored is None:
        raise _no_batch(id)
    return desk.worker.told.get(id, stored.told)


def _no_batch(id: str) -> NotThere:
    return NotThere(f"No batch found with id {quote(id)}.", param="id")


def _field(given: dict[str, Any], name: str, kind: type[str]) -> str:
    if given.get(name) is None:
        raise InvalidRequest(f"Missing required parameter: {name}.", param=name)
    return typed(given[name], kind, name)


def _life(given: Any) -> dict[str, Any]:
    where = "output_expires_after"
    seconds = field(typed(given, dict, where), "seconds", int, where)
    if not _SHORTEST_LIFE <= seconds <= _LONGEST or given.get("anchor") != "created_at":
        raise InvalidRequest(
            f"{where} must be created_at and {_SHORTEST_LIFE} to {_LONGEST} seconds, got {quote(given)}.",
            param=where,
        )
    return {"anchor": "created_at", "seconds": seconds}
