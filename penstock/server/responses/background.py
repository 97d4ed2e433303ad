"""Responses that are made in the background: their clients ask for them later, or follow their events.

    POST background          ─▶ the id ─▶ GET until it is whole
    POST background, stream  ─▶ EventLog ─▶ follow · GET ?stream=true&starting_after=N ─▶ follow

Who follows may leave and come back. It knows no field but those two.
"""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.json import encode
from starlette.types import Message, Send

from penstock.core.errors import PenstockError, Unavailable
from penstock.http.errors import internal
from penstock.http.exchange import respond
from penstock.http.sse import EventStream
from penstock.server.answer import answer
from penstock.server.generation import Choice, Generation

from .answer import ResponsesWriter
from .events import EventLog

_RETRY_AFTER = 5
"""Seconds after which a place may be free."""


async def follow(send: Send, log: EventLog, after: int = -1) -> None:
    """Answer with the events behind number `after`. Cancelling it harms nobody else."""
    stream = EventStream(send)
    async for data in log.follow(after):
        await stream.send(data)
    if not stream.started:
        await stream.send(b"")
    await stream.close()


class BackgroundWriter(ResponsesWriter):
    """A response that nobody waits for."""

    _log: EventLog | None = None

    async def detach(self, send: Send, generation: Generation) -> None:
        """Begin it, and answer: with the response as it is now, or with its events."""
        begun = asyncio.Event()
        task = asyncio.create_task(self._run(generation, begun))
        self.response["status"] = "queued"
        if self.stream is not None:
            self._log = EventLog()
            told = {"response": self.response}
            self._log.add(self._event("response.created", told) + self._event("response.queued", told))
        if not self.keep(cancel=task.cancel):
            task.cancel()
            raise self._no_place()
        self._state.detached.add(task)
        task.add_done_callback(self._state.detached.discard)
        first = encode(self.response)
        await begun.wait()  # its bill is under way from here on, whatever becomes of this request
        if self._log is None:
            await respond(send, first)
        else:
            await follow(send, self._log)

    def keep(self, **entry: Any) -> bool:
        """See ResponsesWriter; its events are kept with it."""
        return super().keep(events=self._log, **entry)

    def opening(self, choice: Choice) -> bytes:
        """See Stream. It has been created before."""
        self.response["status"] = "in_progress"
        return self._event("response.in_progress", {"response": self.response})

    def error(self, error: PenstockError) -> bytes:
        """See Stream. Whoever asks for it later is told as well."""
        self.response |= {
            "status": "failed",
            "completed_at": int(self._state.wall()),
            "error": {"code": "server_error", "message": str(error)},
        }
        self.keep()
        return self._event("response.failed", {"response": self.response})

    async def _run(self, generation: Generation, begun: asyncio.Event) -> None:
        begun.set()  # who cancels it has said so in the store
        log = self._log
        self.response["status"] = "in_progress"
        try:
            if log is None:
                await generation.run()
                for _ in self.whole(generation):
                    pass
            else:
                await answer(self._state.work, self._record, self.response["id"], generation, self)
        except Exception as error:
            known = error if isinstance(error, PenstockError) else internal(error, self.response["id"])
            failed = self.error(known)
            if log is not None:
                log.add(failed)
        finally:
            if log is not None:
                log.close()

    async def _record(self, message: Message) -> None:
        """What an answer is sent with: its events are kept. Raises Unavailable where there is no place."""
        assert self._log is not None
        data = message.get("body", b"")
        if not data:
            return
        if self._store is not None and not self._store.grow(self.response["id"], len(data)):
            self._log.clear()
            raise self._no_place()
        self._log.add(data)

    def _no_place(self) -> Unavailable:
        return Unavailable(
            "There is no place for another response that is made in the background.",
            advice="Try again later; the limits are --max-stored-responses and --max-stored-response-bytes.",
            retry_after=_RETRY_AFTER,
        )
