"""Asking somebody outside of the gateway: an HTTP server that is sent JSON by POST, or a Python callable.

A plain callable runs in a thread, and gets a copy of what it is told. How long either may take, and what its
silence means, is the matter of who asks: hooks, and verifiers. A thread cannot be ended, so each callable has
its own few; once calls that nobody waits for any more hang in all of them, it is not asked.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import aiohttp
import msgspec

from penstock.core.errors import StartupError, brief, cause
from penstock.http.reading import read_at_most

T = TypeVar("T")
_MOST_ANSWER = 32 << 20
_THREADS = 8
OUTSIDE = "it is outside of the house"
"""Why somebody is not asked about what must not leave it."""

Function = Callable[[Any], Any]


class Hanging(Exception):
    """A callable is not asked: too many of its calls still hang."""


class _Threads:
    """Of one callable."""

    def __init__(self, function: Function, name: str) -> None:
        self._function = function
        self._left: list[Future[Any]] = []
        """Calls that nobody waits for any more, of which some may run on."""
        self.pool = ThreadPoolExecutor(_THREADS, name)

    async def call(self, about: Any) -> Any:
        """What it says. Raises Hanging, and whatever it raises."""
        self._left = [each for each in self._left if not each.done()]
        if len(self._left) >= _THREADS:
            raise Hanging(f"{len(self._left)} calls still hang")
        future = self.pool.submit(self._function, about)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                self._left.append(future)
            raise


class Outside:
    """Connections and threads, made when they are first wanted. End with `close`."""

    def __init__(self, name: str) -> None:
        """`name`: of its threads."""
        self._name = name
        self._session: aiohttp.ClientSession | None = None
        self._own: ThreadPoolExecutor | None = None
        self._threads: dict[int, _Threads] = {}
        """By the callable's identity."""

    async def ask(self, url: str | None, function: Function | None, about: dict[str, Any]) -> Any:
        """What is said of `about`, as JSON has it; None for nothing. Raises whatever goes wrong."""
        if function is None:
            return await self._post(str(url), about)
        own = msgspec.json.decode(msgspec.json.encode(about))  # what it does to it is its own
        if inspect.iscoroutinefunction(function):
            return await function(own)
        threads = self._threads.get(id(function))
        if threads is None:
            threads = self._threads[id(function)] = _Threads(function, self._name)
        return await threads.call(own)

    async def aside(self, work: Callable[[], T]) -> T:
        """Do something of the gateway's own in a thread, where nothing of anybody else's runs."""
        if self._own is None:
            self._own = ThreadPoolExecutor(_THREADS, f"{self._name}-own")
        return await asyncio.get_running_loop().run_in_executor(self._own, work)

    async def close(self) -> None:
        """End connections and threads."""
        if self._session is not None:
            await self._session.close()
        for pool in (self._own, *(each.pool for each in self._threads.values())):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

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
            body = await read_at_most(response, _MOST_ANSWER)
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
