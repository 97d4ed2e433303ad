"""Batches that run somewhere: asked about until they have ended, and then charged what they used.

    running ─▶ GET /v1/batches/ID ─▶ completed, failed, expired, cancelled ─▶ usage ─▶ row settled: over
    asked   ─▶ the upstream's list ─▶ found: running; not found: nothing is charged

All that is needed is in the database: it survives any process, and workers take a batch each (`Objects.due`).
A row is settled once, whoever comes first, the client's own GET included.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from penstock.core.errors import Unavailable, brief
from penstock.gateway.owned import ID
from penstock.gateway.policy.amounts import NANO, Amounts
from penstock.gateway.policy.retries import Attempt
from penstock.gateway.records import Row
from penstock.gateway.relay import Failed
from penstock.gateway.stations import Station
from penstock.gateway.tasks import Repeated
from penstock.gateway.usage import Tally, read_answer

from .common import TAG, Shared, whole
from .objects import Kept
from .terms import Terms, charge
from .upstream import TIMEOUT, Missing, UpstreamSaysNo, ask, asked, pages

logger = logging.getLogger("penstock.gateway")

_GRACE = 2 * TIMEOUT
"""Seconds that the answer to a new batch may take."""
_CLOCKS = 3600.0
"""Seconds by which an upstream's clock may be behind."""
_LONGEST = 600.0
"""Seconds that one batch may take of a look, its output file included."""
_GIVE_UP = 8 * 86_400.0
"""Seconds after which nobody asks about a batch any more: its row stays at its reservation."""
_AT_ONCE = 8
_PAGES = 20
_MOST_LINE = 64 << 20
"""Bytes of a line of an output file."""
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


class _Line(msgspec.Struct):
    response: _Response | None = None


class _Response(msgspec.Struct):
    status_code: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


_decode = msgspec.json.Decoder(_Line).decode


class Settling(Repeated):
    """Asks about batches, from `start` to `stop`."""

    interval = 15.0
    failure = "looking after batches failed"

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self._shared = shared
        self._door = shared.door

    async def look(self) -> None:
        """Ask about all batches that nobody has asked about lately."""
        shared = self._shared
        begun = self._door.wall()
        stations = shared.stations()
        before = begun - round(self.interval * NANO)
        while due := await shared.store(lambda: shared.objects.due(before, begun, list(stations), _AT_ONCE)):
            work = (self._one(each, stations[each.replica]) for each in due)
            for failed in await asyncio.gather(*work, return_exceptions=True):
                if isinstance(failed, Unavailable):
                    raise failed
                if failed is not None:
                    logger.error("looking after a batch failed", exc_info=failed)

    async def _one(self, kept: Kept, station: Station) -> None:
        age = (self._door.wall() - kept.created) / NANO
        why = "has not ended"
        try:
            async with asyncio.timeout(_LONGEST):
                if kept.state == "asked":
                    if age <= _GRACE or await self._seek(kept, station):
                        return
                elif await self.told(kept, await ask(station, "GET", f"/v1/batches/{kept.id}"), station):
                    return
        except TimeoutError:
            why = f"took more than {_LONGEST:g} s to be asked about"
        except Missing:
            why = "is not known there"
        except Failed as failed:
            why = f"cannot be asked about: the upstream {failed.message}"
        except UpstreamSaysNo as error:  # whose words may quote the request
            why = f"cannot be asked about: the upstream answered HTTP {error.status}"
        if age > _GIVE_UP:
            logger.error("batch %s of %s %s; its row stays at its reservation", kept.id, station.id, why)
            await self._over(kept)
        elif why != "has not ended":
            logger.warning("batch %s of %s %s", kept.id, station.id, why)

    async def told(self, kept: Kept, batch: dict[str, Any], station: Station) -> bool:
        """Take in what an upstream says of a batch: settle it where it has ended; whether that is done.

        Raises Failed, Missing, PenstockError where it must be tried again.
        """
        shared = self._shared
        if batch.get("id") != kept.id:
            raise Failed(Attempt("invalid"), "answered with another batch")
        body = msgspec.json.encode(batch)
        status = batch.get("status")
        if status not in ENDED or kept.state != "running":
            await shared.store(lambda: shared.objects.change(kept.replica, kept.id, body=body))
            return kept.state == "over"
        terms = msgspec.json.decode(kept.about, type=Terms)
        await self._outputs(kept, batch, station)
        tally, sure = await self._used(batch, station)
        if tally is None:
            logger.error(
                "batch %s of %s has ended, and nobody says what it used: its row stays at its reservation",
                kept.id,
                station.id,
            )
        elif not await self._settle(terms, tally, f"batch {status}{_counts(batch)}", sure=sure):
            return False  # its row is not in the database yet
        await shared.store(lambda: shared.objects.change(kept.replica, kept.id, body=body, state="over"))
        return True

    async def _settle(self, terms: Terms, tally: Tally, note: str, *, sure: bool) -> bool:
        """Settle a row, if nobody has; false where there is no such row yet."""
        pace = self._door.stations.paces.get(terms.place)
        found: list[Row] = []
        settled: list[Row] = []

        def settle(row: Row) -> Amounts | None:
            found.append(row)
            if row.settlement != "unsettled":
                return None
            row.note = brief("; ".join(filter(None, (row.note, note))), 300)
            settled.append(row)
            return charge(terms, row, tally, pace, sure=sure)

        await self._shared.meter.resettle([(terms.worker, terms.number)], settle)
        for row in settled:
            self._door.metrics.billed(row)
        return bool(found)

    async def _seek(self, kept: Kept, station: Station) -> bool:
        """Look for a batch whose answer was lost; whether it is known now what became of it."""
        shared = self._shared
        terms = msgspec.json.decode(kept.about, type=Terms)
        async for batch in pages(station, "/v1/batches", _PAGES):
            if (whole(batch.get("created_at")) or 0) < kept.created / NANO - _CLOCKS:
                break  # the rest is older
            metadata = batch.get("metadata")
            if not isinstance(metadata, dict) or metadata.get(TAG) != terms.request_id:
                continue
            values = {"id": str(batch.get("id")), "state": "running", "body": msgspec.json.encode(batch)}
            await shared.store(lambda values=values: shared.objects.change(kept.replica, kept.id, **values))  # type: ignore[misc]
            return True
        tally = Tally(told=True, final=True)
        if not await self._settle(terms, tally, "no batch came of it", sure=True):
            return False
        await shared.store(lambda: shared.objects.remove(kept.replica, kept.id))
        return True

    async def _outputs(self, kept: Kept, batch: dict[str, Any], station: Station) -> None:
        """What a batch has written is its owner's, and in the list of files."""
        shared = self._shared
        for field in ("output_file_id", "error_file_id"):
            id = batch.get(field)
            if not isinstance(id, str) or not ID.fullmatch(id):
                continue
            try:
                file = await ask(station, "GET", f"/v1/files/{id}")
            except Missing:
                continue
            expires = whole(file.get("expires_at"))
            new = Kept(
                replica=kept.replica,
                id=id,
                kind="file",
                key_id=kept.key_id,
                purpose=str(file.get("purpose", ""))[:64],
                created=self._door.wall(),
                expires=None if expires is None else min(expires * NANO, (1 << 63) - 1),
                body=msgspec.json.encode(file),
            )
            await shared.store(lambda new=new: shared.objects.add(new))  # type: ignore[misc]

    async def _used(self, batch: dict[str, Any], station: Station) -> tuple[Tally | None, bool]:
        """What a batch that has ended used, and whether that is all; None where nobody knows."""
        counts = batch.get("request_counts")
        completed = whole(counts.get("completed")) if isinstance(counts, dict) else None
        tally = Tally()
        if isinstance(batch.get("usage"), dict):
            read_answer(msgspec.json.encode({"usage": batch["usage"]}), tally)
            # zeros of an upstream that has the field, and does not fill it in
            if tally.told and tally.final and (tally.input or tally.output or not completed):
                return tally, True
        id = batch.get("output_file_id")
        if isinstance(id, str) and ID.fullmatch(id):
            return await _summed(station, id)
        return (None, False) if completed else (Tally(told=True, final=True), True)

    async def _over(self, kept: Kept) -> None:
        shared = self._shared
        await shared.store(lambda: shared.objects.change(kept.replica, kept.id, state="over"))


async def _summed(station: Station, id: str) -> tuple[Tally, bool]:
    """The usage of all answers in an output file, and whether each of them says its own."""
    total, sure = Tally(told=True, final=True), True
    rest = b""
    loop = asyncio.get_running_loop()
    async with asked(station, "GET", f"/v1/files/{id}/content") as (response, timer):
        while True:
            timer.reschedule(loop.time() + TIMEOUT)
            piece = await response.content.readany()
            *lines, rest = (rest + piece).split(b"\n") if piece else (rest, b"")
            for line in lines:
                sure &= _take(line, total)
            if not piece:
                return total, sure
            if len(rest) > _MOST_LINE:
                raise Failed(Attempt("invalid"), f"sent a line of over {_MOST_LINE} bytes")


def _take(line: bytes, total: Tally) -> bool:
    """Add the usage of one answer; false where an answer has none."""
    if not line.strip():
        return True
    try:
        response = _decode(line).response
    except (msgspec.MsgspecError, RecursionError):
        return False
    if response is None:  # an error
        return True
    tally = Tally()
    read_answer(bytes(response.body), tally)
    total.input += tally.input
    total.output += tally.output
    total.cached += tally.cached
    if tally.device_seconds is not None:
        total.device_seconds = (total.device_seconds or 0) + tally.device_seconds
    return response.status_code != 200 or (tally.told and tally.final)


def _counts(batch: dict[str, Any]) -> str:
    counts = batch.get("request_counts")
    if not isinstance(counts, dict):
        return ""
    done, total = whole(counts.get("completed")), whole(counts.get("total"))
    return "" if done is None or total is None else f": {done} of {total}"
