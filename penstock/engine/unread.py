"""What waits for whoever reads a request's events: bounded, since the engine waits for nobody.

    engine ──▶ Unread.put ──▶ (a queue for each call of generate) ──▶ Unread.get ──▶ a client that reads

Counted in tokens, and each logprob that is told beside a token as one more: a token takes some 500 bytes, a
logprob 100. Over its bound a call is cut off: what waits is dropped, its sequences are aborted, and their
last events say why, with the bills. All calls together have a bound, too; over that, the one with most is
cut off, also where its sequences have ended. The logprobs of a prompt, which come once, do not count: the
server bounds them by --max-response-bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from penstock.core.errors import SlowReader
from penstock.core.plan import Event, Failure
from penstock.core.request_spec import FinishReason

TOGETHER = 16
"""All calls may hold so many times what one may: with the default, some 270 MB."""


class Call:
    """One call of generate: its sequences' events, in batches."""

    def __init__(self, ids: Collection[str]) -> None:
        self.ids = frozenset(ids)
        self.waiting = 0
        """Tokens that wait."""
        self.failure: Failure | None = None
        """Why it was cut off."""
        self._batches: asyncio.Queue[tuple[list[Event], int]] = asyncio.Queue()

    def end(self) -> None:
        """No more will come: `get` gives an empty batch after what is there."""
        self._batches.put_nowait(([], 0))

    def left(self) -> list[Event]:
        """The events that nobody has taken."""
        events: list[Event] = []
        while not self._batches.empty():
            events += self._batches.get_nowait()[0]
        return events


class Unread:
    """All calls of a process.

    Args:
        limit: tokens that may wait of one call.
        cut_off: aborts a call's sequences.
    """

    def __init__(self, limit: int, cut_off: Callable[[Call], None]) -> None:
        self._limit = limit
        self._cut_off = cut_off
        self._calls: dict[Call, None] = {}
        self._waiting = 0

    def open(self, ids: Collection[str]) -> Call:
        """A new call."""
        call = Call(ids)
        self._calls[call] = None
        return call

    def close(self, call: Call) -> None:
        """Nobody reads it any more."""
        self._calls.pop(call, None)
        self._waiting -= call.waiting
        call.waiting = 0

    def put(self, call: Call, events: list[Event]) -> None:
        """A batch of a call's events.

        The bounds are on what waits already: who reads in time takes each batch before the next one comes,
        however large it is.
        """
        if call.failure is None and call.waiting >= self._limit:
            self._cut(call, "more of it waits to be read than is kept")
        elif self._waiting >= TOGETHER * self._limit:
            most = max(self._calls, key=lambda each: each.waiting, default=call)
            if most.waiting:  # so it has not been cut off yet
                self._cut(
                    most, "more waits of all streams together than is kept, and most of it is this one's"
                )
        if call.failure is not None:
            events = [_last(event, call.failure) for event in events if event.finish is not None]
            size = 0
        else:
            size = sum(map(_size, events))
        if events:
            call.waiting += size
            self._waiting += size
            call._batches.put_nowait((events, size))

    @property
    def much(self) -> bool:
        """Whether so much waits that readers should get their turn before more is put."""
        return self._waiting >= self._limit // 2

    async def get(self, call: Call) -> list[Event]:
        """The next batch; an empty one if the engine has ended."""
        events, size = await call._batches.get()
        if call in self._calls:
            call.waiting -= size
            self._waiting -= size
        return events

    def _cut(self, call: Call, why: str) -> None:
        failure = call.failure = Failure(
            f"The client is too slow for its stream: {why} ({call.waiting} tokens and logprobs).",
            SlowReader.__name__,
            advice="Read it faster, or ask for fewer tokens, choices or logprobs. The server's limit is set "
            "by --max-unread-tokens.",
        )
        last = [_last(event, failure) for event in call.left() if event.finish is not None]
        self._waiting -= call.waiting
        call.waiting = 0
        if last:
            call._batches.put_nowait((last, 0))
        self._cut_off(call)


def _size(event: Event) -> int:
    """Tokens, and logprobs told beside them."""
    return len(event.tokens) + sum(len(logprob.top) for logprob in event.logprobs)


def _last(event: Event, failure: Failure) -> Event:
    """The last event of a sequence that was cut off: its bill and why, and nothing that nobody has read."""
    return event._replace(
        tokens=(), logprobs=(), prompt_logprobs=None, pooled=None, finish=FinishReason.ERROR, failure=failure
    )
