"""One fleet for several gateway processes: who has the engines tells the others, over a Unix socket.

    process with the engines: LocalFleet ◀── Hall ══ Unix socket ══▶ SharedFleet ◀── Door: each worker

    Hall ─▶ worker    {"replica": {…}}       all of them at first, then each that changes
                      {"ready": 7}           a wait has ended well; with `error`, badly
    worker ─▶ Hall    {"wait": 7, "model": "demo", "timeout": 300, "most": 256}        {"cancel": 7}
                      {"use": "demo"}  {"leave": "demo"}      the first request of this worker, and its last

A line of JSON each, in order. A worker that dies takes its waits and its uses with it. What a worker knows of
replicas is older than the truth by the way through the socket: a request may meet a model in the moment in
which it falls asleep. It is not taken then, and wakes the model again (`Request._has_left`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.errors import PenstockError
from penstock.gateway.fleet import Fleet, ModelStarting, Replica
from penstock.gateway.tasks import ended

logger = logging.getLogger("penstock.up")

_LINE = 1 << 20
"""Bytes of a message."""
_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder()


def _line(message: dict[str, Any]) -> bytes:
    return _ENCODER.encode(message) + b"\n"


class Hall:
    """Where workers ask. Belongs to the loop of the fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._writers: set[asyncio.StreamWriter] = set()
        fleet.subscribe(self._changed)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One worker, until it leaves."""
        for model in self._fleet.models():
            for replica in self._fleet.replicas(model):
                writer.write(_line({"replica": replica}))
        writer.write(_line({"models": list(self._fleet.models())}))
        self._writers.add(writer)
        waits: dict[int, asyncio.Task[None]] = {}
        uses: dict[str, contextlib.ExitStack] = {}
        try:
            while line := await reader.readline():
                self._heard(_DECODER.decode(line), writer, waits, uses)
        except ConnectionError:
            pass  # it has died
        except ValueError as error:
            logger.error("a worker of the gateway is not understood: %s", error)
        finally:
            self._writers.discard(writer)
            for use in uses.values():
                use.close()
            await ended(waits.values())
            writer.close()

    def _heard(
        self,
        message: dict[str, Any],
        writer: asyncio.StreamWriter,
        waits: dict[int, asyncio.Task[None]],
        uses: dict[str, contextlib.ExitStack],
    ) -> None:
        match message:
            case {"wait": int(number)}:
                task = waits[number] = asyncio.create_task(self._wait(number, message, writer))
                task.add_done_callback(lambda _: waits.pop(number, None))
            case {"cancel": int(number)}:
                if (waiting := waits.get(number)) is not None:
                    waiting.cancel()
            case {"use": str(model)}:
                uses[model] = contextlib.ExitStack()
                uses[model].enter_context(self._fleet.use(model))
            case {"leave": str(model)}:
                uses.pop(model).close()

    async def _wait(self, number: int, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        answer: dict[str, Any] = {"ready": number}
        try:
            await self._fleet.ready(message["model"], timeout=message["timeout"], max_waiting=message["most"])
        except PenstockError as error:
            answer |= {"error": error.message, "advice": error.advice, "retry_after": error.retry_after}
        writer.write(_line(answer))

    def _changed(self, replica: Replica) -> None:
        line = _line({"replica": replica})
        for writer in self._writers:
            writer.write(line)


class SharedFleet:
    """Implements Fleet, in a worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self.key = key
        self._reader, self._writer = reader, writer
        self._replicas: dict[str, dict[int, Replica]] = {}
        self._watchers: list[Callable[[Replica], None]] = []
        self._waits: dict[int, asyncio.Future[None]] = {}
        self._users: dict[str, int] = {}
        self._number = 0
        self._gone = False
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: str, key: str) -> SharedFleet:
        """Ask at a socket's path; returns once all replicas are known. Raises OSError.

        Args:
            key: the bearer token of the engines.
        """
        fleet = cls(*await asyncio.open_unix_connection(path, limit=_LINE), key)
        while "models" not in (message := await fleet._read()):
            fleet._take(Replica(**message["replica"]))
        fleet._listening = asyncio.create_task(fleet._listen())
        return fleet

    async def close(self) -> None:
        """Leave: uses and waits end with it."""
        if self._listening is not None:
            await ended([self._listening])
        self._lose()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # ------------------------------------------------------------------ Fleet

    def models(self) -> Sequence[str]:
        """See Fleet.models."""
        return tuple(self._replicas)

    def replicas(self, model: str) -> Sequence[Replica]:
        """See Fleet.replicas."""
        return tuple(self._replicas.get(model, {}).values())

    async def ready(self, model: str, *, timeout: float, max_waiting: int | None = None) -> None:
        """See Fleet.ready; those of all workers wait together."""
        if any(replica.state == "ready" for replica in self.replicas(model)):
            return
        if self._gone:
            raise _lost(model)
        self._number += 1
        number, future = self._number, asyncio.get_running_loop().create_future()
        self._waits[number] = future
        self._say({"wait": number, "model": model, "timeout": timeout, "most": max_waiting})
        try:
            await future
        except asyncio.CancelledError:
            self._say({"cancel": number})
            raise
        finally:
            self._waits.pop(number, None)

    def use(self, model: str) -> contextlib.AbstractContextManager[None]:
        """See Fleet.use."""
        return self._use(model)

    def subscribe(self, callback: Callable[[Replica], None]) -> None:
        """See Fleet.subscribe."""
        self._watchers.append(callback)

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _use(self, model: str) -> Iterator[None]:
        count = self._users[model] = self._users.get(model, 0) + 1
        if count == 1:
            self._say({"use": model})
        try:
            yield
        finally:
            self._users[model] -= 1
            if not self._users[model]:
                self._say({"leave": model})

    def _say(self, message: dict[str, Any]) -> None:
        if not self._gone:
            self._writer.write(_line(message))

    async def _read(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the process that has the engines is gone")
        message: dict[str, Any] = _DECODER.decode(line)
        return message

    async def _listen(self) -> None:
        try:
            while True:
                message = await self._read()
                if "replica" in message:
                    self._take(Replica(**message["replica"]))
                else:
                    self._ended(message)
        except OSError as error:
            logger.error("%s", error)
        finally:
            self._lose()

    def _take(self, replica: Replica) -> None:
        self._replicas.setdefault(replica.model, {})[replica.index] = replica
        for watcher in self._watchers:
            watcher(replica)

    def _ended(self, message: dict[str, Any]) -> None:
        waiting = self._waits.get(message["ready"])
        if waiting is None or waiting.done():
            return
        if "error" in message:
            advice, after = message["advice"], message["retry_after"]
            waiting.set_exception(ModelStarting(message["error"], advice=advice, retry_after=after))
        else:
            waiting.set_result(None)

    def _lose(self) -> None:
        """Nobody answers any more: this worker ends soon, and who waits here need not."""
        self._gone = True
        for waiting in self._waits.values():
            if not waiting.done():
                waiting.set_exception(_lost("the model"))


def _lost(model: str) -> ModelStarting:
    return ModelStarting(f"Nobody can start {model}: the engines are being stopped.", retry_after=5)
