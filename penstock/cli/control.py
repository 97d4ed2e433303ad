"""What the process that has started the API processes and they tell each other: JSON over a socket pair.

    starter ── Setup · Listen · Signal · Died ──▶ API process
    starter ◀── Loaded · Refused · Serving ── API process

Each message has its length before it. The end of the socket is the end of the process behind it. Keys travel
here: they are neither in a command line nor in the environment.
"""

from __future__ import annotations

import asyncio
import struct

import msgspec

from penstock.core.errors import BY_NAME, PenstockError, StartupError
from penstock.engine.config import EngineConfig
from penstock.server.config import ServerConfig

_LENGTH = struct.Struct("!I")


class Setup(msgspec.Struct, tag=True, frozen=True):
    """The first message."""

    engine: EngineConfig
    server: ServerConfig
    """Its limits are those of this process."""
    directory: str
    """Of the engine's sockets."""
    index: int
    """Of this process among the API processes, from 1."""
    count: int
    client: int
    """Its number for the engine."""
    listener: int
    """File descriptor of the socket that all of them accept on."""
    log_level: str
    first: bool
    """Whether it tells of the model's files; what all find there is said once."""


class Listen(msgspec.Struct, tag=True, frozen=True):
    """Accept connections."""


class Signal(msgspec.Struct, tag=True, frozen=True):
    """The starter got a signal."""

    number: int


class Error(msgspec.Struct, frozen=True):
    """A PenstockError on its way."""

    type: str
    message: str
    param: str | None = None
    advice: str = ""

    @classmethod
    def of(cls, error: PenstockError) -> Error:
        """Pack."""
        return cls(type(error).__name__, error.message, error.param, error.advice)

    def exception(self) -> PenstockError:
        """Unpack."""
        kind = BY_NAME.get(self.type, StartupError)
        return kind(self.message, param=self.param, advice=self.advice)


class Died(msgspec.Struct, tag=True, frozen=True):
    """The engine has ended."""

    failure: Error


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """It could listen."""

    template: bool
    """Whether the model has a chat template."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """It cannot serve."""

    error: Error


class Serving(msgspec.Struct, tag=True, frozen=True):
    """It listens."""


Message = Setup | Listen | Signal | Died | Loaded | Refused | Serving
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Message).decode


class Channel:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def tell(self, message: Message) -> None:
        """Send, without waiting; to one that is gone, nothing."""
        if not self._writer.is_closing():
            body = _encode(message)
            self._writer.write(_LENGTH.pack(len(body)) + body)

    async def hear(self) -> Message | None:
        """The next message; None when the other end is closed."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            message: Message = _decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    def close(self) -> None:
        """Say no more."""
        self._writer.close()
