"""One attempt: a request to one station, and its answer on the way to the client.

    send ─▶ headers ─▶ whole body ────────────▶ client, with what it cost in headers
                    └▶ first event ─▶ events ─▶ client; from here on only who can go on behind them is asked

Everything that goes wrong before the client has seen a byte is a `Failed`, after which somebody else may be
asked; later too, where somebody else can go on with the stream. It knows bytes and times; whom to ask, and
what it costs, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.types import Send

from penstock.core.errors import PenstockError, brief
from penstock.http.chunks import describe_error
from penstock.http.client import Answer, ConnectFailed, Disconnected, Incomplete, NotHttp
from penstock.http.deadline import Deadline

from .endpoints import Endpoint
from .hooks import MOST_EVENTS
from .policy.retries import OWN_FAULT_STATUS, RETRIED_STATUS, Attempt, Fault
from .stations import Station
from .stream import StreamFilter, TooLong
from .transcript import Transcript, is_final
from .usage import Tally, read_answer

MOST_BYTES = 128 << 20
"""Of a whole answer: it is held until its end, to be sure that it is one."""
_MOST_ERROR = 64 << 10
_FAREWELL = 1.0
"""Seconds that an upstream gets to end its answer after a stream's last event."""
_SHOWN = frozenset({"content-type", "openai-processing-ms", "retry-after"})


class UpstreamError(PenstockError):
    """An upstream has failed, and nobody else could be asked."""

    status = 502
    type = "upstream_error"


class Failed(Exception):
    """An attempt that came to nothing."""

    def __init__(self, attempt: Attempt, message: str, said: str = "") -> None:
        """`said`: the upstream's own words. They may quote the request: the client gets them, no log does."""
        super().__init__(message)
        self.attempt = attempt
        self.message = message
        self.said = brief(said, 300)

    def error(self, name: str) -> UpstreamError:
        """What the client is told. `name`: the upstream's."""
        fault, status = self.attempt.fault, self.attempt.status
        retry_after = self.attempt.retry_after
        error = UpstreamError(
            f"The upstream {name} {self.message}" + (f": {self.said}" if self.said else "."),
            retry_after=None if retry_after is None else min(3600, max(1, round(retry_after))),
        )
        error.code = f"upstream_{fault}"
        if fault in ("slow", "stalled"):
            error.status = 504
        elif fault == "busy" or status in (429, 503, 529):
            error.status = 503
            error.retry_after = error.retry_after or 1
        return error


@dataclass(slots=True)
class Exchange:
    """What has come of a request so far; filled in by the attempt."""

    tally: Tally = field(default_factory=Tally)
    status: int = 0
    """Of the upstream's answer."""
    asked: bool = False
    """Whether the upstream may have begun to work on it."""
    whole: bool = False
    """Whether a stream has had its last event."""
    begun: bool = False
    """Whether the client has seen a byte."""
    first_byte_at: float | None = None
    seen: bytearray = field(default_factory=bytearray)
    """Of a stream, what hooks are shown afterwards."""
    sent: bool = False
    """Whether the client has been sent all of it."""
    refused: bool = False
    """Whether the upstream said what is wrong with the request."""
    broken: Failed | None = None
    """Why the stream broke, of which the client has been told in it."""

    def next(self) -> Exchange:
        """Of a stream that somebody else goes on with."""
        return Exchange(begun=self.begun, first_byte_at=self.first_byte_at, seen=self.seen)


Headers = Callable[[], list[tuple[bytes, bytes]]]


class Relay:
    """One attempt."""

    def __init__(
        self,
        station: Station,
        endpoint: Endpoint,
        exchange: Exchange,
        send: Send,
        rename: Callable[[bytes], bytes] | None = None,
        inspect: Callable[[bytes], Awaitable[bytes]] | None = None,
        transcript: Transcript | None = None,
    ) -> None:
        """
        Args:
            rename: writes the client's ids into whole events, or a whole answer.
            inspect: is shown a whole answer before the client, and may write another one; of a stream, the
                exchange keeps the beginning instead.
            transcript: of a stream that somebody else can go on with when it breaks.
        """
        self._transcript = transcript
        self._inspect = inspect
        self._station = station
        self._endpoint = endpoint
        self._rename = rename
        self._exchange = exchange
        self._send = send
        self._loop = asyncio.get_running_loop()

    async def run(
        self, body: bytes, headers: dict[str, str], *, usage_wanted: bool, stream: bool, extra: Headers
    ) -> None:
        """Ask, and answer the client. Raises Failed before the client has seen anything, or where somebody
        else can go on; otherwise a stream ends with an error event, and `Exchange.broken` says so.

        Args:
            headers: of the request to the upstream.
            usage_wanted: whether the client sees the usage of a stream.
            stream: whether it asked for one.
            extra: headers of the answer, as known when it begins.
        """
        station, exchange = self._station, self._exchange
        fault: Fault = "slow"
        exchange.asked = True
        try:
            async with Deadline(station.timeout_connect + station.timeout_headers) as timer:  # noqa: SIM117
                async with station.ask(self._endpoint.path, body, headers) as response:
                    exchange.status = response.status
                    if response.status != 200:
                        self._idle(timer)
                        await self._refused(response, timer, extra)
                        return
                    if response.content_type == "text/event-stream":
                        if not stream:
                            raise Failed(Attempt("invalid"), "answered with a stream that was not asked for")
                        await self._stream(response, timer, usage_wanted, extra)
                        return
                    if exchange.begun:
                        raise Failed(Attempt("invalid"), "does not go on with a stream")
                    fault = "stalled"
                    await self._whole(response, timer, extra)
        except TimeoutError:
            fault = "stalled" if exchange.status else fault
            await self._broken(Failed(Attempt(fault), self._late(fault)))
        except ConnectFailed as error:
            exchange.asked = False
            late = isinstance(error.__cause__, TimeoutError)
            what = f"took no connection within {station.timeout_connect:g} s"
            if not late:
                what = f"cannot be reached: {_reason(error.__cause__ or error)}"
            await self._broken(Failed(Attempt("connect"), what))
        except Incomplete:
            await self._broken(Failed(Attempt("cut"), "broke off in the middle of its answer"))
        except Disconnected as error:
            what = "closed the connection without an answer"
            if error.__cause__ is not None:
                what = f"lost the connection: {_reason(error.__cause__)}"
            await self._broken(Failed(Attempt("reset"), what))
        except NotHttp:
            await self._broken(Failed(Attempt("invalid"), "answered with what is no HTTP"))
        except TooLong:
            await self._broken(Failed(Attempt("invalid"), "sent an event without an end"))

    async def _stream(self, response: Answer, timer: Deadline, usage_wanted: bool, extra: Headers) -> None:
        """Relay events. What is awaited until the first one counts as waiting for headers: engines send those
        at once, and then the request stands in a queue."""
        exchange, send, transcript = self._exchange, self._send, self._transcript
        filter = StreamFilter(self._endpoint, exchange.tally, usage_wanted=usage_wanted)
        idle, now = self._station.timeout_idle, self._loop.time
        held = b""  # comments that keep a connection alive are no answer yet
        while piece := await response.readany():
            out = filter.feed(piece)
            if out and transcript is not None:
                out = transcript.take(out)
            if filter.failed is not None:
                timer.reschedule(None)
                failed = Failed(Attempt("error"), "failed", describe_error(filter.failed))
                await self._tell(out)
                if exchange.begun and is_final(filter.failed):
                    await self.give_up(failed)
                else:
                    await self._broken(failed)
                return
            if transcript is not None and transcript.aborted:
                timer.reschedule(None)
                await self._tell(out)
                await self._broken(Failed(Attempt("error"), "ended before its answer did"))
                return
            if out and self._rename is not None:
                out = self._rename(out)
            if self._inspect is not None and len(exchange.seen) < MOST_EVENTS:
                exchange.seen += out[: MOST_EVENTS - len(exchange.seen)]
            if not exchange.begun:
                held = out = held + out
            if out and exchange.tally.events:
                timer.reschedule(None)  # a client that reads slowly is no upstream that writes slowly
                if not exchange.begun:
                    await self._begin(response, extra())
                await send({"type": "http.response.body", "body": out, "more_body": True})
            exchange.whole = filter.ended
            timer.reschedule(now() + (_FAREWELL if filter.ended else idle))
        timer.reschedule(None)
        if not filter.ended:
            await self._broken(Failed(Attempt("cut"), "broke off in the middle of its answer"))
            return
        if not exchange.begun:
            await self._begin(response, extra())
        exchange.sent = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, response: Answer, timer: Deadline, extra: Headers) -> None:
        self._idle(timer)
        body = await self._read(response, timer, MOST_BYTES)
        if body is None:
            raise Failed(Attempt("invalid"), f"sent an answer of over {MOST_BYTES} bytes")
        if not read_answer(body, self._exchange.tally):
            raise Failed(Attempt("invalid"), "sent an answer that is no JSON object")
        if self._rename is not None:
            body = self._rename(body)
        if self._inspect is not None:
            timer.reschedule(None)
            body = await self._inspect(body)
        await self._answer(response, timer, body, extra)

    async def _refused(self, response: Answer, timer: Deadline, extra: Headers) -> None:
        """Another status than 200. What is wrong with the request is for the client; the rest is not."""
        status = response.status
        body = await self._read(response, timer, _MOST_ERROR) or b""
        said = describe_error(body) if body else ""
        if status in OWN_FAULT_STATUS:
            raise Failed(Attempt("status", status), f"refuses the gateway's own key (HTTP {status})")
        if status in RETRIED_STATUS or status >= 500:
            after = _seconds(response.headers.get("retry-after"))
            raise Failed(Attempt("status", status, after), f"answered HTTP {status}", said)
        if self._exchange.begun:  # of a stream whose beginning was no fault of the request
            raise Failed(Attempt("status", status), f"answered HTTP {status}", said)
        if not 400 <= status < 500:
            raise Failed(Attempt("invalid", status), f"answered HTTP {status}, which is no answer here")
        self._exchange.refused = True
        await self._answer(response, timer, body, extra)

    async def _read(self, response: Answer, timer: Deadline, most: int) -> bytes | None:
        """The whole body; None if it is larger."""
        pieces: list[bytes] = []
        size = 0
        idle, now = self._station.timeout_idle, self._loop.time
        while piece := await response.readany():
            size += len(piece)
            if size > most:
                return None
            pieces.append(piece)
            timer.reschedule(now() + idle)
        return b"".join(pieces)

    async def _answer(self, response: Answer, timer: Deadline, body: bytes, extra: Headers) -> None:
        timer.reschedule(None)
        await self._begin(response, [(b"content-length", str(len(body)).encode()), *extra()])
        self._exchange.sent = True
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, response: Answer, extra: list[tuple[bytes, bytes]]) -> None:
        self._exchange.begun = True
        self._exchange.first_byte_at = self._loop.time()
        fields = [
            (name.encode(), value.encode("latin-1", "replace"))
            for name, value in response.headers.items()
            if name in _SHOWN
        ]
        if response.content_type == "text/event-stream":
            fields += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        status = response.status
        await self._send({"type": "http.response.start", "status": status, "headers": fields + extra})

    async def _tell(self, out: bytes) -> None:
        if out and self._exchange.begun:
            if self._rename is not None:
                out = self._rename(out)
            await self._send({"type": "http.response.body", "body": out, "more_body": True})

    async def _broken(self, failed: Failed) -> None:
        """Raise, or end the stream with an error where it has begun and nobody can go on with it."""
        if not self._exchange.begun:
            raise failed from None
        if self._exchange.whole:  # and then its connection broke, which the client need not know
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if self._transcript is not None and self._transcript.can_go_on:
            raise failed from None
        await self.give_up(failed)

    async def give_up(self, failed: Failed) -> None:
        """End a stream with an error."""
        self._exchange.broken = failed
        last = self._endpoint.error_event(failed.error(self._station.id))
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def _idle(self, timer: Deadline) -> None:
        timer.reschedule(self._loop.time() + self._station.timeout_idle)

    def _late(self, fault: Fault) -> str:
        station = self._station
        if fault == "stalled":
            return f"sent nothing more for {station.timeout_idle:g} s"
        return f"did not begin to answer within {station.timeout_headers:g} s"


def _reason(error: BaseException) -> str:
    """The operating system's words where it has some, and no addresses."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number and number > 0 else type(error).__name__


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; dates are not understood."""
    if text is None or not text.strip().isdecimal() or len(text) > 9:
        return None
    return float(text)
