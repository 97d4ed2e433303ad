"""What the result of a step does to the requests in it: tokens, ends, bills, failures.

    StepResult ─▶ bill ─┬─ failed    its last event; whoever shares what it never filled starts over
                        ├─ finished  meanwhile: its last event, once no step is under way with it
                        ├─ sampled   its tokens, up to the one that ends it
                        └─ pooled    its vector, and its last event

A result reaches a request only in the epoch of the admission that it was computed for. Nothing is planned
here: that is the scheduler's other half.
"""

from __future__ import annotations

from .blocks import BlockPool
from .cost import StepCost
from .flights import Flight, Flights
from .plan import Event, Failure, Outcome, Plan, PlanItem, StepResult
from .policy import Policy
from .request import Request, State
from .request_spec import FinishReason
from .roll import Roll
from .stats import Totals
from .swap import Swaps


class Results:
    """Takes in the results of one scheduler's steps, in their order."""

    def __init__(
        self,
        roll: Roll,
        flights: Flights,
        *,
        pool: BlockPool,
        swaps: Swaps,
        policy: Policy,
        cost: StepCost,
        totals: Totals,
    ) -> None:
        self._roll = roll
        self._flights = flights
        self._pool = pool
        self._swaps = swaps
        self._policy = policy
        self._cost = cost
        self._totals = totals

    def take_in(self, plan: Plan, result: StepResult, now: float) -> list[Event]:
        """What the requests of a step have to tell. Raises ValueError for another plan than the oldest one
        under way."""
        flight = self._flights.end(plan, result)
        events: list[Event] = []
        failed = any(map(_failure, plan.items, result.outcomes))
        self._bill(plan, result.seconds, learn=result.regular and not failed)
        if failed:
            self._fail(flight, result, now, events)
        for item, outcome in zip(plan.items, result.outcomes, strict=True):
            request = self._roll.requests.get(item.request)
            if request is None:  # it has failed in this very step
                continue
            if request.state is State.FINISHED:
                if not request.inflight:
                    events.append(self._roll.last_event(request))
                continue
            if request.epoch != item.epoch:
                continue
            if outcome.prompt_logprobs:
                request.prompt_logprobs += outcome.prompt_logprobs
            if item.samples:
                event = self._append(request, item, outcome, now)
            elif item.pools:
                end = Event(request.id, pooled=outcome.pooled, finish=FinishReason.STOP, at=now)
                event = self._roll.finish(request, end)
            else:
                continue
            if event is not None:
                events.append(event)
        return events

    def _bill(self, plan: Plan, seconds: float, *, learn: bool) -> None:
        for item, share in zip(plan.items, self._cost.attribute(plan, seconds), strict=True):
            request = self._roll.requests[item.request]
            request.inflight -= 1
            request.device_seconds += share
            if self._policy.dynamic:
                self._roll.view.served[request.spec.tenant] += share
        if learn:
            self._cost.observe(plan, seconds)

    def _append(self, request: Request, item: PlanItem, outcome: Outcome, now: float) -> Event | None:
        """Take in sampled tokens, up to the one that ends the request."""
        tokens, first = outcome.tokens, not request.generated
        request.pending -= item.samples
        if item.drafts:
            self._verify(request, item, len(tokens))
        finish, stop_reason = None, None
        for count, token in enumerate(tokens, start=1):
            request.tokens.append(token)
            if token in request.stops or len(request.tokens) >= request.max_len:
                finish, stop_reason = self._stop(request, token)
                if finish is not None:
                    tokens = tokens[:count]
                    break
        self._totals.generation_tokens += len(tokens)
        about_prompt = None
        if first and request.spec.prompt_logprobs_of(request.index) is not None:
            about_prompt, request.prompt_logprobs = tuple(request.prompt_logprobs), []
        event = Event(
            request.id,
            tokens,
            outcome.logprobs[: len(tokens)] if finish is not None else outcome.logprobs,
            about_prompt,
            None,
            finish,
            stop_reason,
            None,
            now,
            request.scheduled_at,
            request.cached or 0,
            request.device_seconds,
            request.preemptions,
        )
        return event if finish is None else self._roll.finish(request, event)

    def _verify(self, request: Request, item: PlanItem, right: int) -> None:
        """Take back what was computed from drafts that were wrong."""
        request.speculating = False
        self._totals.drafted_tokens += len(item.drafts)
        self._totals.accepted_tokens += right - 1
        wrong = item.samples - right
        request.reached -= wrong
        if request.state is State.RUNNING:
            request.computed -= wrong

    def _stop(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        sampling = request.spec.sampling
        assert sampling is not None  # a request without is never sampled
        free = request.spec.grammar is None  # else what was sampled was allowed there, min_tokens or not
        if token in request.stops and (request.generated >= sampling.min_tokens or not free):
            by_eos = token in request.spec.eos_ids and not (sampling.ignore_eos and free)
            return FinishReason.STOP, None if by_eos else token
        return (FinishReason.LENGTH if len(request.tokens) >= request.max_len else None), None

    def _fail(self, flight: Flight, result: StepResult, now: float, events: list[Event]) -> None:
        """End requests that failed in this step. Whoever shares blocks that were never filled, in this step
        or in one that is planned on top of it, starts over."""
        worthless: set[int] = set()
        for item, outcome, table in zip(flight.plan.items, result.outcomes, flight.tables, strict=True):
            failure = _failure(item, outcome)
            if failure is None:
                continue
            first = item.start // self._pool.block_size
            worthless.update(table[first:])
            if failure.tainted:
                # those who share its earlier blocks are on their own; nobody else is to find them, nor what
                # anybody has built on them
                self._pool.unregister_all()
            request = self._roll.requests[item.request]
            if request.state is not State.FINISHED and request.epoch == item.epoch:
                event = Event(item.request, finish=FinishReason.ERROR, failure=failure, at=now)
                if (last := self._roll.finish(request, event)) is not None:
                    events.append(last)
        self._pool.unregister(sorted(worthless))
        running = [(request.id, request.epoch, request.blocks) for request in self._roll.running]
        copied = self._swaps.standing(flight.plan.step)
        for request_id, epoch, spoiled in self._flights.standing_on(
            worthless, flight, self._pool.block_size, running, copied
        ):
            # what was computed on worthless ground is worthless, too: it would be found once more when
            # somebody computes what it stands on again
            self._pool.unregister(spoiled)
            sharer = self._roll.requests.get(request_id)
            if sharer is not None and sharer.state is not State.FINISHED and sharer.epoch == epoch:
                self._roll.start_over(sharer)


def _failure(item: PlanItem, outcome: Outcome) -> Failure | None:
    """Why an item has no answer."""
    if outcome.failure is not None:
        return outcome.failure
    if outcome.tokens:
        return None
    if item.samples:
        return Failure("the executor returned no token for it")
    if item.pools and outcome.pooled is None:
        return Failure("the executor returned no vector for it")
    return None
