"""Whole files from and to URLs, as `run-batch` takes them: GET for what is read, PUT for what is written."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import aiohttp

from penstock.core.errors import StartupError

logger = logging.getLogger("penstock.http")

_TIMEOUT = aiohttp.ClientTimeout(total=1000)
_PIECE = 1 << 18
"""Bytes of a file that are held at once."""
_TRIES = 5
_WAIT = 5.0
"""Seconds between two tries."""


def is_url(path: str) -> bool:
    """Whether it is fetched or sent, not opened."""
    return path.startswith(("http://", "https://"))


async def fetch(url: str, target: Path) -> None:
    """Write to `target` what GET answers. Raises StartupError."""
    try:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.get(url) as answer:
            if answer.status != 200:
                raise StartupError(f"GET {url} answered HTTP {answer.status}.", param="--input-file")
            with target.open("wb") as file:
                async for piece in answer.content.iter_chunked(_PIECE):
                    await asyncio.to_thread(file.write, piece)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise StartupError(f"{url} cannot be fetched: {_reason(error)}.", param="--input-file") from error


async def send(source: Path, url: str) -> None:
    """PUT a file, again after a while where that fails. Raises StartupError after the last try."""
    for attempt in range(1, _TRIES + 1):
        try:
            async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
                with source.open("rb") as file:
                    async with session.put(url, data=file) as answer:
                        if 200 <= answer.status < 300:
                            return
                        problem = f"HTTP {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = _reason(error)
        logger.warning("PUT %s, try %d of %d: %s", url, attempt, _TRIES, problem)
        if attempt < _TRIES:
            await asyncio.sleep(_WAIT)
    raise StartupError(
        f"The output could not be sent to {url}: {problem}.",
        param="--output-file",
        advice=f"It is in {source}.",
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
