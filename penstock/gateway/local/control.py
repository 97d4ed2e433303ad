"""How `penstock tune` has an engine of `penstock up` started again with other flags: over a Unix socket.

    tune ── {"hold": "demo", "replica": 0} ──▶ up      {"url": …, "key": …, "arguments": […], "slo": {…}, …}
         ── {"flags": {"max-num-seqs": 32}} ──▶        {"ready": 2.1}          restarted, seconds
         ── {"keep": true} ──▶                         {"kept": {…}}          the end will change nothing

A line of JSON each; an answer may be {"error": …, "advice": …}. One holds a replica at a time. With the
end of the connection, however it came, the replica runs with the spec's flags again, unless it was to keep
others.

Who may: the socket is in a folder of the user who runs `up`, which nobody else can enter, and the engine's
key goes to whoever connects; that user could read it in /proc anyhow. Only numbers can be set, of two flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import PenstockError, StartupError
from penstock.gateway.tasks import ended
from penstock.http.unix import UnixSocket

from .fleet import LocalFleet

logger = logging.getLogger("penstock.up")

FLAGS = frozenset({"max-num-seqs", "max-num-batched-tokens"})
"""What can be set."""
_LARGEST = 1 << 20
_LINE = 1 << 16
"""Bytes of a message."""
_READY = 1800.0
"""Seconds for a restart."""


def folder() -> Path:
    """Where control sockets are: of this user alone. Raises StartupError where that cannot be had."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and Path(given).is_dir():
        place = Path(given) / "penstock"
    else:
        place = Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError as error:
        raise StartupError(f"There can be no folder {place}: {error}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StartupError(
            f"{place} is not a folder of this user alone.",
            advice="Remove it, or set XDG_RUNTIME_DIR to a folder that nobody else can enter.",
        )
    return place


def path_for(port: int) -> Path:
    """The control socket of the `penstock up` whose gateway listens on this port."""
    return folder() / f"up-{port}.sock"


class Control:
    """Answers at the socket. Belongs to the loop of the fleet."""

    def __init__(self, fleet: LocalFleet) -> None:
        self._fleet = fleet
        self._held: set[tuple[str, int]] = set()
        self._flags: dict[tuple[str, int], dict[str, int]] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path) -> None:
        """Begin. Raises StartupError where there can be no such socket."""
        self._socket = UnixSocket(str(path))
        self._server = await asyncio.start_unix_server(self._serve, sock=self._socket, limit=_LINE)

    async def close(self) -> None:
        """End: whoever holds something lets go of it, without another restart."""
        if self._server is not None:
            self._server.close()
            await ended(self._tasks)
            self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        visit = _Visit(self._fleet, self._held, self._flags, reader, writer)
        try:
            await visit.run()
        except asyncio.CancelledError:
            pass  # `up` ends, and its engines with it
        finally:
            visit.close()
            self._tasks.discard(task)
            writer.close()


class _Visit:
    """One connection."""

    def __init__(
        self,
        fleet: LocalFleet,
        held: set[tuple[str, int]],
        flags: dict[tuple[str, int], dict[str, int]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """held: replicas that are held. flags: what they run with beside the spec's. Both are everybody's."""
        self._fleet, self._held, self._all = fleet, held, flags
        self._reader, self._writer = reader, writer
        self._mine: tuple[str, int] | None = None
        self._keep = False
        self._use = contextlib.ExitStack()

    async def run(self) -> None:
        heard = asyncio.ensure_future(self._line())
        try:
            while (line := await heard) is not None:
                heard = asyncio.ensure_future(self._line())
                answering = asyncio.ensure_future(self._safely(line))
                try:
                    await asyncio.wait({heard, answering}, return_when=asyncio.FIRST_COMPLETED)
                    if heard.done() and not answering.done():  # it has gone, or talks out of turn
                        break
                    answer = await answering
                finally:
                    await ended([answering])
                self._writer.write(msgspec.json.encode(answer) + b"\n")
                await self._writer.drain()
        except ConnectionError:
            pass  # it has gone
        finally:
            heard.cancel()
        await self._restore()

    def close(self) -> None:
        """Hold nothing any more."""
        self._use.close()
        if self._mine is not None:
            self._held.discard(self._mine)

    async def _safely(self, line: bytes) -> dict[str, Any]:
        try:
            return await self._answer(msgspec.json.decode(line))
        except PenstockError as error:
            return {"error": error.message, "advice": error.advice}
        except msgspec.DecodeError as error:
            return {"error": f"This is no message: {error}."}

    @property
    def _flags(self) -> dict[str, int]:
        return {} if self._mine is None else self._all.get(self._mine, {})

    async def _line(self) -> bytes | None:
        try:
            line = await self._reader.readline()
        except ValueError:  # longer than any message
            return None
        return line or None

    async def _answer(self, message: Any) -> dict[str, Any]:
        match message:
            case {"hold": str(model), "replica": int(index)}:
                return await self._hold(model, index)
            case {"flags": dict(flags)}:
                return {"ready": await self._set(flags)}
            case {"keep": True}:
                self._keep = True
                return {"kept": self._flags}
        raise StartupError("This message is not known.", advice="Use penstock tune of the same version.")

    async def _hold(self, model: str, index: int) -> dict[str, Any]:
        fleet = self._fleet
        if model not in fleet.models():
            known = ", ".join(fleet.models())
            raise StartupError(
                f"There is no model {model} here.", advice=f"Use --model with one of: {known}."
            )
        if not 0 <= index < len(fleet.replicas(model)):
            raise StartupError(f"{model} has no replica {index}; it has {len(fleet.replicas(model))}.")
        if self._mine is not None or (model, index) in self._held:
            raise StartupError(f"Somebody tunes {model}/{index} already.", advice="Wait for the end of that.")
        self._mine = model, index
        self._held.add(self._mine)
        self._use.enter_context(fleet.use(model))  # it must not fall asleep meanwhile
        await fleet.start_replica(model, index, timeout=_READY)
        logger.info("%s/%d: penstock tune measures it, and may restart it", model, index)
        replica = fleet.replicas(model)[index]
        slo = fleet.spec(model).slo
        return {
            "url": replica.url,
            "key": fleet.key,
            "engine": fleet.spec(model).engine,
            "device": replica.device,
            "arguments": list(fleet.arguments(model, index)),
            "flags": self._flags,
            "slo": slo.model_dump(exclude_none=True) if slo is not None else {},
        }

    async def _set(self, flags: Mapping[str, Any]) -> float:
        if self._mine is None:
            raise StartupError("Nothing is held.", advice="Begin with hold.")
        for name, value in flags.items():
            if name not in FLAGS or type(value) is not int or not 1 <= value <= _LARGEST:
                raise StartupError(
                    f"--{name} cannot be set to {value!r} here.",
                    advice=f"Whole numbers from 1 to {_LARGEST:,} of: {', '.join(sorted(FLAGS))}.",
                )
        self._all[self._mine] = dict(flags)
        began = asyncio.get_running_loop().time()
        await self._fleet.restart(*self._mine, flags, timeout=_READY)
        return asyncio.get_running_loop().time() - began

    async def _restore(self) -> None:
        """The connection has ended: back to the spec, as far as that was left."""
        if self._mine is None or not self._flags:
            return
        if self._keep:
            logger.info("%s/%d goes on with %s", *self._mine, _shown(self._flags))
            return
        logger.info("%s/%d: penstock tune has ended; the spec's flags again", *self._mine)
        self._all.pop(self._mine)
        with contextlib.suppress(PenstockError):  # the log has said why
            await self._fleet.restart(*self._mine, {}, timeout=_READY)


def _shown(flags: Mapping[str, int]) -> str:
    return " ".join(f"--{name} {value}" for name, value in flags.items())


class Held:
    """A replica of `up`'s, from the other end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.told: Mapping[str, Any] = {}
        """What `up` has said of it: url, key, engine, device, slo, the spec's arguments, and the flags it
        runs with beside them, if a session before has kept some."""

    @classmethod
    async def take(cls, path: Path, model: str, index: int) -> Held:
        """Hold a replica until `close`. Raises OSError if nobody listens, StartupError if it is refused."""
        held = cls(*await asyncio.open_unix_connection(str(path), limit=_LINE))
        try:
            held.told = await held._ask({"hold": model, "replica": index})
        except BaseException:
            held.close()
            raise
        return held

    async def restart(self, flags: Mapping[str, int]) -> float:
        """Have it started again with these flags after its own; the seconds until it was ready.

        Raises StartupError where it does not start.
        """
        return float((await self._ask({"flags": dict(flags)}))["ready"])

    async def keep(self) -> None:
        """Let it go on with the last flags, until `up` ends."""
        await self._ask({"keep": True})

    def close(self) -> None:
        """Let go of it: it is started again with the spec's flags, unless they were to be kept."""
        self._writer.close()

    async def _ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            self._writer.write(msgspec.json.encode(message) + b"\n")
            await self._writer.drain()
            line = await self._reader.readline()
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise StartupError("penstock up has ended meanwhile.")
        answer: Mapping[str, Any] = msgspec.json.decode(line)
        if "error" in answer:
            raise StartupError(str(answer["error"]), advice=str(answer.get("advice", "")))
        return answer
