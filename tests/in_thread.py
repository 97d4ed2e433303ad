"""An aiohttp application that is served within a test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web


@contextmanager
def served(
    app: web.Application, loop: asyncio.AbstractEventLoop | None = None, **settings: Any
) -> Iterator[str]:
    """Serve on a free port, in a thread; its URL.

    Args:
        loop: it runs there, and is closed at the end; by default a new one.
        settings: of the AppRunner.
    """
    own = loop or asyncio.new_event_loop()
    runner = web.AppRunner(app, access_log=None, **settings)
    ready = threading.Event()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    def serve() -> None:
        own.run_until_complete(start())
        own.call_soon(ready.set)  # a stop that comes before run_forever would be lost
        own.run_forever()
        own.run_until_complete(runner.cleanup())
        own.close()

    thread = threading.Thread(target=serve, name="test-server")
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        own.call_soon_threadsafe(own.stop)
        thread.join()
