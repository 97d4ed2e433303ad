"""One exchange about a file or a batch with the upstream that has it.

What goes wrong has the words and codes that `relay` has for it. It knows bytes and times; whose something is,
and what it costs, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from penstock.core.errors import InvalidRequest
from penstock.gateway.owned import ID
from penstock.gateway.policy.retries import OWN_FAULT_STATUS, RETRIED_STATUS, Attempt
from penstock.gateway.relay import Failed
from penstock.gateway.stations import Station
from penstock.http.chunks import describe_error
from penstock.http.reading import read_at_most

TIMEOUT = 60.0
"""Seconds of an exchange without a file."""
_MOST_OBJECT = 1 << 20
"""Bytes of what an upstream says of a file or a batch."""
_MOST_PAGE = 16 << 20


class UpstreamSaysNo(InvalidRequest):
    """What the upstream finds wrong with the request."""


class Missing(Exception):
    """The upstream has no such thing."""


@asynccontextmanager
async def asked(
    station: Station, method: str, path: str, *, timeout: float = TIMEOUT, **options: Any
) -> AsyncIterator[tuple[aiohttp.ClientResponse, asyncio.Timeout]]:
    """An answer of status 200, whose body is to be read, and the timer of it all. Raises Failed, Missing,
    UpstreamSaysNo."""
    headers = {"accept-encoding": "identity", **options.pop("headers", {})}
    try:
        async with (
            asyncio.timeout(timeout) as timer,
            station.request(method, path, once=True, headers=headers, **options) as response,
        ):
            if response.status != 200:
                await _refused(response)
            yield response, timer
    except TimeoutError:
        raise Failed(Attempt("slow"), "did not answer in time") from None
    except aiohttp.ConnectionTimeoutError:
        raise Failed(Attempt("connect"), "takes no connection") from None
    except aiohttp.ClientConnectorError:
        raise Failed(Attempt("connect"), "cannot be reached") from None
    except (aiohttp.ClientPayloadError, asyncio.IncompleteReadError):
        raise Failed(Attempt("cut"), "broke off in the middle of its answer") from None
    except aiohttp.ClientResponseError:
        raise Failed(Attempt("invalid"), "answered with what is no HTTP") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Failed(Attempt("reset"), f"lost the connection: {type(error).__name__}") from None


async def ask(
    station: Station, method: str, path: str, *, most: int = _MOST_OBJECT, **options: Any
) -> dict[str, Any]:
    """The JSON object that an upstream answers with. Raises as `asked`."""
    async with asked(station, method, path, **options) as (response, _):
        body = await _read(response, most)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Failed(Attempt("invalid"), "sent an answer that is no JSON object")
    return value


async def pages(station: Station, path: str, most: int) -> AsyncIterator[dict[str, Any]]:
    """The entries of an upstream's list, newest first. Raises as `asked`, and Failed after `most` pages."""
    after = ""
    for _ in range(most):
        page = await ask(station, "GET", f"{path}?limit=100{after}", most=_MOST_PAGE)
        entries = page.get("data")
        found = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
        for each in found:
            yield each
        last = str(found[-1].get("id", "")) if found else ""
        if not page.get("has_more") or not ID.fullmatch(last):
            return
        after = f"&after={last}"
    raise Failed(Attempt("invalid"), f"lists more than {most} pages")


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body up to `most` bytes. Raises Failed where it is longer."""
    body = await read_at_most(response, most)
    if len(body) > most:
        raise Failed(Attempt("invalid"), f"sent an answer of over {most} bytes")
    return body


async def _refused(response: aiohttp.ClientResponse) -> None:
    """Another status than 200."""
    status = response.status
    body = await _read(response, _MOST_OBJECT)
    said = describe_error(body) if body else ""
    if status in OWN_FAULT_STATUS:
        raise Failed(Attempt("status", status), f"refuses the gateway's own key (HTTP {status})")
    if status == 404:
        raise Missing
    if status in RETRIED_STATUS or status >= 500:
        raise Failed(Attempt("status", status), f"answered HTTP {status}", said)
    if not 400 <= status < 500:
        raise Failed(Attempt("invalid", status), f"answered HTTP {status}, which is no answer here")
    error = UpstreamSaysNo(f"The upstream answered HTTP {status}: {said}")
    error.status = status
    raise error
