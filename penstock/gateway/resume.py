"""A stream that breaks goes on at another replica: whom to ask, how often, and what each of them did.

    attempt ─✂─▶ a part ─▶ another replica of the same place ─▶ attempt, behind the tokens so far ─▶ …
                              └─ nobody, or often enough: an error event

Only streams of engines that trust the gateway, of one choice, without what needs to see its own beginning
(tools, grammars, log-probabilities). The same tokens make the same text only with the same model: fallbacks
and other targets are not asked. It knows the order of things; `transcript` knows the bytes, `request` the
attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from penstock.core.errors import PenstockError

from . import bill
from .policy.retries import pause
from .policy.routes import Place
from .records import Asked
from .relay import Failed
from .stations import Station
from .transcript import Transcript, can_go_on
from .usage import Tally

if TYPE_CHECKING:
    from .request import Request


class Resumption:
    """Of one request."""

    def __init__(self, request: Request) -> None:
        self.transcript: Transcript | None = None
        """Of the stream, if another replica can go on with it."""
        self.parts: list[bill.Part] = []
        """What engines did whose streams broke."""
        self._request = request
        self._possible: bool | None = None

    @property
    def behind(self) -> int:
        """Tokens that the client has had, where the next attempt goes on behind them."""
        transcript = self.transcript
        return transcript.count if transcript is not None and self._request.exchange.begun else 0

    def begin(self, station: Station) -> bytes | None:
        """An attempt begins; returns what was generated so far, as JSON, where it is to go on."""
        if self._request.exchange.begun:
            return None if self.transcript is None else self.transcript.ids
        self.transcript = Transcript() if self._may(station) else None
        return None

    def _may(self, station: Station) -> bool:
        request = self._request
        if not station.trusted or not request.way.route.retries or request.is_copy:
            return False
        if self._possible is None:
            self._possible = can_go_on(request.envelope)
        return self._possible

    def count(self, tally: Tally) -> None:
        """Put into the present attempt's tally what was not told, but counted."""
        transcript = self.transcript
        if transcript is not None and transcript.prompt is not None and not tally.final:
            tally.input, tally.cached = transcript.prompt
            tally.events = transcript.gained

    def broke(self, station: Station, asked: Asked) -> bill.Part | None:
        """The present attempt has failed: what the client has had of it, if that is anything."""
        request, transcript = self._request, self.transcript
        if transcript is None or not request.exchange.begun or not transcript.gained:
            return None
        self.count(request.exchange.tally)
        part = bill.Part(station, asked, request.exchange.tally, transcript.gained)
        self.parts.append(part)
        return part

    async def go_on(
        self, failed: Failed, place: Place, number: int, tried: set[str], used: contextlib.ExitStack
    ) -> None:
        """The stream has broken, in the attempt of that number: ask others for the rest, as often as the
        route has it. In the end it is whole, or has its error event."""
        request = self._request
        while not await self._is_whole():
            number += 1
            station = await self._next(failed, place, number, tried, used)
            if station is None:
                await request.give_up(failed)
                return
            tried.add(station.id)
            written = len(request.notes)
            try:
                await request.attempt(place, station, number)
                return
            except Failed as error:
                failed = error
            finally:
                self._note(station, written)

    async def _next(
        self, failed: Failed, place: Place, number: int, tried: set[str], used: contextlib.ExitStack
    ) -> Station | None:
        """Whom to ask, once he may be asked: another replica, or the same one after a pause."""
        request = self._request
        if number > 1 + request.way.route.retries:
            return None
        try:
            found = await request.candidates.next((place,), tried, used)
        except PenstockError:  # the model does not start again
            return None
        if found is None:
            return None
        station = found[1]
        elsewhere = station.id not in tried
        if not elsewhere and failed.attempt.fault in ("slow", "stalled"):
            return None  # whoever hangs would hang again, for as long
        seconds = pause(number - 1, failed.attempt, request.door.draw(), elsewhere=elsewhere)
        if seconds:
            await asyncio.sleep(seconds)
        return None if seconds is None else station

    async def _is_whole(self) -> bool:
        """Whether the client has had everything but the usage and the end; it gets those then."""
        request, transcript = self._request, self.transcript
        assert transcript is not None
        transcript.next()
        if not transcript.finished:
            return False
        exchange = request.exchange
        exchange.status, exchange.whole, exchange.sent = 200, True, True
        request.notes.append("only its end was missing")
        last = transcript.ending(request.envelope.usage_wanted)
        await request.send({"type": "http.response.body", "body": last, "more_body": False})
        return True

    def _note(self, station: Station, at: int) -> None:
        """Say in the row who went on, before what else was noted of that."""
        request, transcript = self._request, self.transcript
        if transcript is not None and transcript.gained:
            request.door.metrics.resumed(request.row.upstream)
            before = transcript.count - transcript.gained
            other = " (another build)" if transcript.differs else ""
            request.notes.insert(at, f"resumed at {station.id}{other} after {before} tokens")
