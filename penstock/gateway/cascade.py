"""A request on a route that escalates: a cheap attempt, a verdict on it, and where it does not do, a dearer
answer.

    reserve for both ─▶ attempt, kept from the client ─▶ verifiers
        passed ─▶ client; one row, which has the verdict
        else   ─▶ its row is written (`escalated`), and a second request goes on with the rest of what was
                  reserved ─▶ client

So every dollar is in one row: the attempt's in `ID.attempt`, the dearer answer's in `ID`, which names it. It
knows the order of things; what is good enough, and what follows, is decided in policy/escalation.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.core.errors import PenstockError, Unavailable
from penstock.spec.routes import Escalation

from .answers import DIALECTS, read, without_logprobs
from .curtain import Curtain, Kept
from .envelope import Envelope
from .hooks import MOST_EVENTS
from .policy.amounts import Amounts
from .policy.escalation import Finding, errored, follows
from .policy.retries import Attempt
from .policy.routes import Forbidden, Way, order
from .relay import MOST_BYTES, Failed, UpstreamError
from .request import Request

if TYPE_CHECKING:
    from .door import Door

MOST_KEPT = MOST_BYTES
"""Of an attempt's answer, until the verdict."""


class Cascade:
    """One such request. Made of the request for the attempt, before it runs."""

    def __init__(self, door: Door, first: Request, way: Way, envelope: Envelope) -> None:
        """
        Args:
            way: the escalation's.
            envelope: the body as it came, before the route's caps were written into it.
        """
        escalation = first.way.route.escalate
        assert escalation is not None
        self._escalation: Escalation = escalation
        self._door = door
        self._first = first
        self._stream = first.envelope.stream
        self._curtain = Curtain(first.send, stream=self._stream)
        self._kept = Kept(MOST_KEPT)
        self._hides_logprobs = False
        self._answered = False
        """Whether the attempt's answer is one that the client could have."""
        self._finding: Finding | None = None
        self._second = self._dearer(way, envelope)
        self._worst: Amounts | None = None
        """What the second one may use."""
        if door.verifiers.wants_logprobs(first.way.name):
            first.envelope = first.envelope.copy()
            self._hides_logprobs = DIALECTS[first.endpoint.path].ask(first.envelope)
        first.send, first.held = self._kept.take, True

    def _dearer(self, way: Way, envelope: Envelope) -> Request | None:
        """The request that may follow; None where it would have to leave the house, and must not."""
        door, first = self._door, self._first
        try:
            targets, fallback = way.places(first.caller.local_only)
        except Forbidden:
            return None
        places = order(targets, fallback, [door.draw() for _ in targets])
        send = self._curtain.pass_on
        return Request(door, first.endpoint, envelope, first.caller, way, places, send)

    async def run(self) -> None:
        """Reserve, ask, judge, perhaps ask again; answer, commit."""
        first, second, curtain = self._first, self._second, self._curtain
        self._worst = None if second is None else second.charge.worst()
        await first.admit(self._worst)
        async with curtain.company():
            try:
                await first.conclude(self._attempt())
                if first.charge.handed_over:
                    assert second is not None
                    await second.conclude(self._escalate(second))
            except PenstockError as error:
                if not curtain.started:
                    raise
                await curtain.fail(first.endpoint.error_event(error))

    # ---- the attempt ----

    async def _attempt(self) -> None:
        """Ask, and judge. Then the client has the answer, or the rest of the reservation is the second
        request's."""
        first, escalation = self._first, self._escalation
        error = await self._ask()
        refused = first.exchange.refused
        self._answered = error is None and not refused
        finding = self._finding = await self._judge(error)
        row = first.row
        row.verifier, row.verdict = finding.verifier, finding.verdict
        row.score, row.reason = finding.score, finding.reason
        self._door.metrics.verdict(row.route, finding.verifier, finding.verdict)
        if follows(escalation, finding, refused=refused, errored=error is not None):
            if self._hand_over(error):
                return
            if self._answered and escalation.on_unavailable == "fail":
                raise self._out(first, self._unavailable())
        if error is not None and first.exchange.broken is None:
            raise self._out(first, error)
        await self._deliver(first)

    async def _ask(self) -> PenstockError | None:
        """The attempt's answer, kept; or why there is none."""
        first, limit = self._first, self._escalation.attempt_timeout
        error: PenstockError | None = None
        try:
            async with asyncio.timeout(limit) as timer:
                await first.ask()
        except TimeoutError:
            if not timer.expired():
                raise
            error = UpstreamError(f"The attempt took longer than {limit:g} s.")
            error.code, error.status = "attempt_timeout", 504
            first.charge.lose()
        except PenstockError as failure:
            error = failure
        first.exchange.sent = False  # the client has none of it
        if error is None and first.exchange.broken is not None:
            error = first.exchange.broken.error(first.row.upstream)
        if error is not None:
            first.row.status = error.status
        return error

    async def _judge(self, error: PenstockError | None) -> Finding:
        first = self._first
        if error is not None:
            return errored(error.code or f"status {error.status}")
        if first.exchange.refused:
            return errored(f"refused with {first.exchange.status}")
        tally = first.exchange.tally
        tokens = tally.output if tally.final and tally.told else None
        answer = read(first.endpoint, bytes(self._kept.body), streamed=self._stream, tokens=tokens)
        stays = first.way.stays(first.caller.local_only)
        return await self._door.verifiers.verify(first.way.name, answer, first.about, stays=stays)

    def _hand_over(self, error: PenstockError | None) -> bool:
        """End the attempt with a row of its own; false where nobody dearer may be asked, or cannot now."""
        first, second, finding = self._first, self._second, self._finding
        assert finding is not None
        if second is None or self._worst is None:
            first.notes.insert(0, "not escalated: local_only")  # first: a long note loses its end
            return False
        row, id = first.row, first.row.id
        second.row.id, second.row.at, second.started = id, row.at, first.started
        second.row.tags, second.row.escalated_from = row.tags, f"{id}.attempt"
        second.span, second.earlier = first.span, row
        second.headers_out = self._curtain.started
        second.marks.append((b"x-penstock-escalated", finding.verifier.encode()))
        row.id = f"{id}.attempt"
        row.status = row.status or first.exchange.status
        row.end = "done" if error is None else "upstream_failed"
        if error is not None:
            first.charge.lose()
        try:
            first.charge.hand_over(second, self._worst)
        except Unavailable:
            row.id = id
            first.notes.insert(0, "not escalated: the spool cannot be written")
            return False
        return True

    # ---- the dearer answer ----

    async def _escalate(self, second: Request) -> None:
        """Ask, and answer; where nobody does, with the attempt's answer if there is one."""
        metrics, finding = self._door.metrics, self._finding
        assert finding is not None
        failure: PenstockError | None = None
        try:
            await second.ask()
        except PenstockError as error:
            failure = error
        refused = self._curtain.refusal
        if failure is not None and failure is second.refusal:  # of a hook, which has seen the answer
            raise self._out(second, failure)
        if failure is None and refused is None and second.exchange.broken is None:
            metrics.escalated(second.row.route, finding.verifier, "answered")
            return
        metrics.escalated(second.row.route, finding.verifier, "failed")
        if second.exchange.begun and refused is None:  # the client has a part of it, and knows that it broke
            return
        if self._answered and self._escalation.on_unavailable == "answer":
            second.notes.insert(0, f"answered with the attempt ({finding.verifier}: {finding.verdict})")
            second.exchange.broken = Failed(Attempt("error"), "could not be asked")
            await self._deliver(second)
            return
        if failure is not None:
            raise self._out(second, failure)
        assert refused is not None
        second.exchange.sent = True
        await self._curtain.release(refused, bytes(refused.body), [])

    async def _deliver(self, request: Request) -> None:
        """Give the client what the attempt has answered. `request`: whose end that is."""
        finding, exchange = self._finding, request.exchange
        assert finding is not None
        body = bytes(self._kept.body)
        if self._hides_logprobs:
            body = without_logprobs(body, streamed=self._stream)
        more = []
        if self._answered:
            exchange.status = 200
            request.held = False
            if finding.verdict != "passed" and self._door.spec.gateway.expose_routing:
                more.append((b"x-penstock-unverified", finding.verifier.encode()))
            if request.inspects and self._stream:
                exchange.seen[:], exchange.whole = body[:MOST_EVENTS], True
            elif request.inspects:
                body = await request.inspect(body)
        exchange.first_byte_at = self._door.monotonic()
        exchange.sent = True
        request.row.unverified = self._answered and finding.verdict != "passed"
        await self._curtain.release(self._kept, body, more)

    def _out(self, request: Request, error: PenstockError) -> PenstockError:
        """An error on its way to the client."""
        request.headers_out = self._curtain.started
        return error

    def _unavailable(self) -> PenstockError:
        finding = self._finding
        assert finding is not None
        if self._second is not None:
            return Unavailable(
                f"The answer did not pass {finding.verifier}, and no other can be asked for now."
            )
        error = Forbidden(
            f"The answer did not pass {finding.verifier}, and a better one is only to be had outside of the "
            "house, where this request must not go (local_only of its key, team, tag, route or header)."
        )
        error.code = "local_only"
        return error


def cascades(request: Request) -> bool:
    """Whether a request on a route that escalates is one of these: its answer has a text, and it continues
    nothing, which only one replica could go on with."""
    return request.endpoint.path in DIALECTS and request.previous is None
