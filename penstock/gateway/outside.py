"""Asking somebody outside of the gateway: an HTTP server that is sent JSON by POST, or a Python callable.

A plain callable runs in a thread, and gets a copy of what it is told. How long either may take, and what its
silence means, is the matter of who asks: hooks, and verifiers.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import aiohttp
import msgspec

from penstock.core.errors import StartupError, brief, cause

from .stations import read_body

T = TypeVar("T")
_MOST_ANSWER = 32 << 20
_THREADS = 8

Function = Callable[[Any], Any]


class Outside:
    """Connections and threads, made when they are first wanted. End with `close`."""

    def __init__(self, name: str) -> None:
        """`name`: of its threads."""
        self._name = name
        self._session: aiohttp.ClientSession | None = None
        self._threads: ThreadPoolExecutor | None = None

    async def ask(self, url: str | None, function: Function | None, about: dict[str, Any]) -> Any:
        """What is said of `about`, as JSON has it; None for nothing. Raises whatever goes wrong."""
        if function is None:
            return await self._post(str(url), about)
        own = msgspec.json.decode(msgspec.json.encode(about))  # what it does to it is its own
        if inspect.iscoroutinefunction(function):
            return await function(own)
        return await self.aside(lambda: function(own))

    async def aside(self, work: Callable[[], T]) -> T:
        """Do something in a thread."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, self._name)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """End connections and threads."""
        if self._session is not None:
            await self._session.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _post(self, url: str, about: dict[str, Any]) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None)
            )
        headers = {"content-type": "application/json"}
        data = msgspec.json.encode(about)
        async with self._session.post(url, data=data, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}")
            body = await read_body(response, _MOST_ANSWER)
            if len(body) > _MOST_ANSWER:
                raise ValueError(f"an answer of over {_MOST_ANSWER} bytes")
            return msgspec.json.decode(body) if body.strip() else None


def find(python: str, where: str) -> Function:
    """The callable of `package.module:function`. Raises StartupError; `where`: in the spec."""
    module, _, name = python.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise StartupError(
            f"{where}: {python} cannot be imported: {brief(cause(error), 200)}.",
            advice="Its module must be on Python's path (PYTHONPATH).",
        ) from error
    if not callable(function):
        raise StartupError(f"{where}: {python} is not callable.")
    return function  # type: ignore[no-any-return]
