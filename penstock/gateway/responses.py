"""Responses that were made before: read, ended, deleted, by their owner, at the replica that has them.

    GET, DELETE /v1/responses/NAME      POST …/NAME/cancel      GET …/NAME/input_items?limit=…

Nothing of this uses a model, so there is no row. A path or query of a client reaches an upstream only after
it was read and written anew.
"""

from __future__ import annotations

import asyncio
import re

import aiohttp
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, PenstockError
from penstock.http.exchange import respond
from penstock.http.reading import read_at_most

from .door import Door
from .owned import Renamer
from .relay import MOST_BYTES, UpstreamError

_QUERY = re.compile(r"((limit|order|after|before|include(%5B%5D|\[\])?)=[A-Za-z0-9_.-]{0,128}(&|$))*")
_RELAYED = frozenset({200, 400, 404, 409})
_TIMEOUT = 60.0


async def manage(door: Door, suffix: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Relay one such request. `suffix`: what follows the id in the path. Raises PenstockError."""
    try:
        caller = await door.caller(scope)
        key_id = caller.principal.key_id
        name = scope["path_params"]["name"]
        id, station = door.owned.read(name, door.stations.all(), key_id)
        query = scope.get("query_string", b"").decode("latin-1")
        if not _QUERY.fullmatch(query):
            raise InvalidRequest("The query of this URL is not understood here.")
    except PenstockError as error:
        door.metrics.refused(error.code or str(error.status))
        raise
    path = f"/v1/responses/{id}{suffix}" + (f"?{query}" if query else "")
    headers = {"x-request-id": scope["request_id"], "accept-encoding": "identity"}
    try:
        async with asyncio.timeout(_TIMEOUT):
            async with station.request(scope["method"], path, once=True, headers=headers) as response:
                status = response.status
                body = await read_at_most(response, MOST_BYTES) if status in _RELAYED else b""
                if len(body) > MOST_BYTES:
                    raise UpstreamError(f"The upstream {station.id} sent over {MOST_BYTES} bytes.")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UpstreamError(f"The upstream {station.id} did not answer: {type(error).__name__}.") from None
    if status not in _RELAYED:
        raise UpstreamError(f"The upstream {station.id} answered HTTP {status}.")
    rename = Renamer(door.owned, station, key_id, {id: name})
    await respond(send, rename(body), status=status)
