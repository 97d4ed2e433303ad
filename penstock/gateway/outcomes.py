"""How requests turned out, as their owners say later: for the cost of a success.

    POST /v1/outcomes   {"request_id": ID, "outcome": "success"}        or "failure", or "score": 0.8
                        {"outcomes": [{…}, …]}                          each with its own answer
    x-penstock-outcome: ID=success                                      on any later request of the same owner

An id is known to the key that asked, and to keys of the same team; everybody else gets the 404 of an id that
there is not. A row is in the ledger some time after its request has ended (metering.py), so what is not there
yet is looked for again before it is unknown.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from pydantic import Field, ValidationError, model_validator
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, PenstockError, Unavailable, quote
from penstock.http.body import parse_object, read_body
from penstock.http.errors import error_object
from penstock.http.exchange import respond
from penstock.spec.load import said
from penstock.spec.parts import Part

from .ledger.outcomes import MOST_WORDS, Telling, Told, outcome_of, score_text, tell, unknown
from .ledger.rollups import score
from .policy.amounts import NANO

if TYPE_CHECKING:
    from .door import Door
    from .metering import LedgerMeter
    from .request import Caller

logger = logging.getLogger("penstock.gateway")

PATH = "/v1/outcomes"
HEADER = "x-penstock-outcome"
AGAIN = (0.1, 0.2, 0.4, 0.8)
"""Seconds between two looks for a request that is not in the ledger yet."""
_BODY = 1 << 20
"""Bytes of a request."""
_MOST = 1000
"""Outcomes of one request."""
_MOST_IN_HEADER = 8
_AT_ONCE = 100
"""In one transaction: leases wait for it."""
_WAITING = 16
"""Requests that look for what is not there yet, at a time."""


class Word(Part):
    """What is told of one request."""

    request_id: Annotated[str, Field(min_length=1, max_length=256)]
    """As in the header `x-request-id` of its answer."""
    outcome: Literal["success", "failure"] | None = None
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    """How much of a success it was."""

    @model_validator(mode="after")
    def _one(self) -> Word:
        if (self.outcome is None) == (self.score is None):
            raise ValueError("it has either outcome, success or failure, or score, from 0 to 1")
        return self

    @property
    def telling(self) -> Telling:
        """As the ledger has it."""
        if self.outcome is not None:
            return Telling(self.request_id, self.outcome)
        return Telling(self.request_id, score_text(Decimal(repr(self.score))))


class RequestNotFound(InvalidRequest):
    """Nobody who asks so has made a request of that id."""

    status = 404
    code = "request_not_found"


class TooLate(InvalidRequest):
    """The window in which outcomes may be told is over."""

    status = 409
    code = "outcome_too_late"


class ToldTooOften(InvalidRequest):
    """It has changed its mind as often as one may."""

    status = 409
    code = "outcome_told_too_often"


class Outcomes:
    """The endpoint and the header, for a door with a ledger."""

    def __init__(self, door: Door, meter: LedgerMeter, window: float) -> None:
        """`window`: seconds from a request's arrival."""
        self._door = door
        self._meter = meter
        self._window = round(window * NANO)
        self._waiting = asyncio.Semaphore(_WAITING)

    def routes(self) -> list[Route]:
        """Its path."""
        return [Route(PATH, _Page(self), methods=["POST"])]

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell one, or several. Raises PenstockError; of several, each has its own."""
        caller = await self._door.caller(scope)
        body = parse_object(await read_body(scope, receive, _BODY))
        several = _several(body)
        if several is None:
            telling = _word(body).telling
            [told] = await self._tell([telling], caller)
            await _answer(send, self._said(telling, told))
            return
        words: list[Telling | PenstockError] = []
        for place, each in enumerate(several):
            try:
                words.append(_word(each, f"outcomes.{place}.").telling)
            except InvalidRequest as error:
                words.append(error)
        tellings = [word for word in words if isinstance(word, Telling)]
        answers = iter(await self._tell(tellings, caller))
        data = []
        for given, word in zip(several, words, strict=True):
            if isinstance(word, Telling):
                try:
                    data.append(self._said(word, next(answers)))
                    continue
                except PenstockError as error:
                    refusal = error
            else:
                refusal = word
            id = given.get("request_id") if isinstance(given, dict) else None
            data.append(
                {"object": "outcome", "request_id": id, "status": refusal.status, **error_object(refusal)}
            )
        failed = sum("error" in each for each in data)
        counts = {"total": len(data), "told": len(data) - failed, "failed": failed}
        await _answer(send, {"object": "list", "data": data, "counts": counts})

    def hear(self, caller: Caller) -> None:
        """What a request's header says of earlier ones, while it goes on. Raises InvalidRequest where that
        cannot be read; what becomes of it is in the log, since nobody waits for it."""
        text = caller.headers.get(HEADER)
        if text is None:
            return
        tellings = read_header(text)
        self._door.behind(self._quietly(tellings, caller))

    async def _quietly(self, tellings: Sequence[Telling], caller: Caller) -> None:
        try:
            answers = await self._tell(tellings, caller)
        except Unavailable as error:
            logger.warning("%d outcomes of a header are lost: %s", len(tellings), error.message)
            self._door.metrics.outcomes("lost", len(tellings))
            return
        for telling, told in zip(tellings, answers, strict=True):
            try:
                self._said(telling, told)
            except PenstockError as error:
                logger.warning("%s of key %s: %s", HEADER, caller.principal.key_id, error.message)

    async def _tell(self, tellings: Sequence[Telling], caller: Caller) -> list[Told]:
        """Raises Unavailable."""
        principal, now = caller.principal, self._door.wall()
        owner = (principal.key_id, principal.team)
        await self._await(tellings, owner)
        found: list[Told] = []
        for first in range(0, len(tellings), _AT_ONCE):
            some = tellings[first : first + _AT_ONCE]
            found += await self._meter.thread.call(
                partial(tell, self._meter.store, some, now=now, since=now - self._window, owner=owner)
            )
        for verdict, count in Counter(each.verdict for each in found).items():
            self._door.metrics.outcomes(verdict, count)
        return found

    async def _await(self, tellings: Sequence[Telling], owner: tuple[str, str]) -> None:
        """Until the rows are there, or long enough."""
        ids = {each.id for each in tellings}
        for pause in (*AGAIN, None):
            ids = await self._meter.thread.call(partial(unknown, self._meter.store, ids, owner))
            if not ids or pause is None or self._waiting.locked():
                return
            async with self._waiting:
                await asyncio.sleep(pause)

    def _said(self, telling: Telling, told: Told) -> dict[str, Any]:
        """The answer. Raises what speaks against it."""
        name = quote(telling.id)
        if told.verdict == "unknown":
            raise RequestNotFound(
                f"There is no request {name} of this key or its team.",
                param="request_id",
                advice="It is the x-request-id of an answer. A request that still runs, or has ended this "
                "moment, is in the ledger soon: tell it again then.",
                retry_after=2,
            )
        if told.verdict == "late":
            days = self._window / NANO / 86_400
            raise TooLate(
                f"The request {name} is older than {days:g} days: its outcome cannot be told any more.",
                param="request_id",
                advice="How long it can is ledger.outcome_window.",
            )
        if told.verdict == "too_many":
            raise ToldTooOften(
                f"Of the request {name} {MOST_WORDS} outcomes have been told; the last one stays.",
                param="request_id",
            )
        return {
            "object": "outcome",
            "request_id": telling.id,
            "outcome": telling.outcome if telling.outcome in ("success", "failure") else None,
            "score": score(telling.outcome) / NANO,
            "changed": told.verdict == "told",
            "before": told.before,
        }


def read_header(text: str) -> list[Telling]:
    """`ID=success`, `ID=failure`, `ID=0.8`; several with commas between. Raises InvalidRequest."""
    found = []
    for each in text.split(","):
        id, equals, value = each.strip().rpartition("=")
        outcome = outcome_of(value)
        if not (id and equals) or outcome is None or len(id) > 256:
            raise InvalidRequest(
                f"The header {HEADER}: {quote(each.strip())} is not REQUEST_ID=OUTCOME.",
                param=HEADER,
                advice="OUTCOME is success, failure, or a score from 0 to 1.",
            )
        found.append(Telling(id, outcome))
    if len(found) > _MOST_IN_HEADER:
        raise InvalidRequest(
            f"The header {HEADER} tells {len(found)} outcomes, of which {_MOST_IN_HEADER} may be in one.",
            param=HEADER,
            advice=f"POST {PATH} takes {_MOST} at a time.",
        )
    return found


class _Page:
    """The endpoint as an ASGI application."""

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = self._outcomes._door
        try:
            with door.under_way():
                await self._outcomes.serve(scope, receive, send)
        except PenstockError as error:
            door.metrics.refused(error.code or str(error.status))
            raise


def _several(body: Mapping[str, Any]) -> list[Any] | None:
    if "outcomes" not in body:
        return None
    more = sorted(set(body) - {"outcomes"})
    if more:
        raise InvalidRequest(f"{quote(more[0])} stands beside outcomes, which is alone.", param=more[0])
    given = body["outcomes"]
    if not isinstance(given, list) or not 1 <= len(given) <= _MOST:
        size = f"{len(given)} of them" if isinstance(given, list) else quote(given)
        raise InvalidRequest(
            f"outcomes must be a list of 1 to {_MOST} outcomes, got {size}.", param="outcomes"
        )
    return given


def _word(value: Any, where: str = "") -> Word:
    try:
        return Word.model_validate(value)
    except ValidationError as error:
        path, what = next(said(error, Word))
        name = f"{where}{'.'.join(map(str, path))}".rstrip(".")
        text = f"{quote(name)}: {what}" if name else what
        raise InvalidRequest(text, param=name or None) from None


async def _answer(send: Send, value: Mapping[str, Any]) -> None:
    await respond(send, msgspec.json.encode(value))
