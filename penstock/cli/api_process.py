"""One of several API processes before one engine.

    python -m penstock.cli.api_process DESCRIPTOR          of its end of the channel to its starter (control)

    Setup ─▶ loading ─▶ Loaded ── (all are) Listen ─▶ serving ── Signal ─▶ draining ─▶ exit 0

Signals reach it through its starter only: whoever signals a whole group of processes, as terminals and
systemd do, would otherwise signal it twice. When its starter is gone, it goes, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from penstock.core.errors import PenstockError
from penstock.observe import logs

from .control import Channel, Died, Error, Listen, Loaded, Refused, Serving, Setup, Signal

logger = logging.getLogger("penstock.server")


class ApiProcess:
    """Its side of the channel, and what follows from that."""

    def __init__(self, channel: Channel, setup: Setup) -> None:
        from penstock.engine.attached import AttachedEngine

        self._channel = channel
        self._setup = setup
        self._engine = AttachedEngine(Path(setup.directory), setup.engine, setup.client, setup.index)
        self._listen = asyncio.Event()
        self._actions: Any = {}
        self._early: list[int] = []
        """Signals that came before there was anything to do for them."""

    async def run(self) -> int:
        """Load, wait until all have, serve. Returns the exit status."""
        from penstock.http.peers import Peers
        from penstock.http.serve import serve

        from .api import create

        setup = self._setup
        hearing = asyncio.create_task(self._hear())
        try:
            app, template = await create(self._engine, setup.engine, setup.server)
        except PenstockError as error:
            self._channel.tell(Refused(Error.of(error)))
            await self._engine.close()
            return 2
        self._channel.tell(Loaded(template))
        await self._listen.wait()
        logging.getLogger().setLevel(setup.log_level.upper())
        status = await serve(
            app,
            setup.server,
            self._engine,
            socket.socket(fileno=setup.listener),
            name="engine",
            on_started=lambda: self._channel.tell(Serving()),
            handle_signals=False,
            on_actions=self._take_actions,
            peers=Peers(Path(setup.directory) / "connections", setup.index - 1, setup.count),
        )
        hearing.cancel()
        return status

    def _take_actions(self, actions: Any) -> None:
        self._actions = actions
        for number in self._early:
            self._act(number)

    def _act(self, number: int) -> None:
        if not self._actions:
            self._early.append(number)
        elif action := self._actions.get(number):
            action()

    async def _hear(self) -> None:
        while (message := await self._channel.hear()) is not None:
            if isinstance(message, Listen):
                self._listen.set()
            elif isinstance(message, Signal):
                self._act(message.number)
            elif isinstance(message, Died):
                await self._engine.died(message.failure.exception())
        os._exit(1)  # nobody is left to serve for, or to tell


def label(index: int) -> str:
    """What the log calls an API process."""
    return f"api {index}"


async def _run(channel: socket.socket) -> int:
    from penstock.observe.shared import share

    talk = Channel(*await asyncio.open_connection(sock=channel))
    setup = await talk.hear()
    if not isinstance(setup, Setup):
        return 1
    level = setup.log_level if setup.first else "error"
    logs.configure(label(setup.index), level=level, format=setup.server.log_format)
    share(Path(setup.directory) / "metrics", f"api{setup.index}")
    from penstock.http.ids import number_as
    from penstock.text.template_pool import pool

    number_as(setup.client)
    pool().start()  # it imports jinja2 while the engine loads
    status = await ApiProcess(talk, setup).run()
    talk.close()
    return status


def main(descriptor: int) -> int:
    """Run one; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from .api import loop_factory

    channel = socket.socket(fileno=descriptor)
    channel.setblocking(False)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(channel))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
