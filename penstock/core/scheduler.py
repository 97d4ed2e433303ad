"""The scheduler: which tokens of which requests each step computes, in which blocks.

    add · abort · schedule(now) → Plan · commit(plan, result, now) → events

Rules of a step, in this order:

1. Requests that need one token (decode) go first, then the rest of prompts already begun, each in policy
   order. So a long prompt can never push a token stream out of a step; it takes what the token budget leaves.
2. No prompt takes more than `long_prefill_token_threshold` tokens of a step, and all prompts together, where
   others decode, take at most `max_num_mixed_prefill_tokens`, and four for each that decodes (0: no such
   limits). The latter bounds the gap between two tokens of a stream.
3. A running request that needs a block when none is available preempts the policy's victim, which may be
   itself. A victim loses its blocks and its computed tokens, keeps its generated ones, and goes back to the
   queue; its full blocks stay in the prefix index until they are evicted, so it usually resumes cheaply.
4. If nobody was preempted, waiting requests are admitted in policy order, strictly: the first that does not
   fit ends admission, so nobody is starved by smaller ones. A request is admitted when blocks for all of its
   known tokens are available, and gets them at once.
5. Blocks enter the prefix index when they are scheduled, not when they are computed: a later request of the
   same step may share them, because executors write all keys and values of a layer before they read any.
6. What still waits beyond the queue's bounds is refused, from the end of policy order, siblings with their
   leader.

Steps may be planned ahead: `schedule` may be called again before the last plan is committed (plans are
committed in order). A request then has tokens whose ids are not known yet; a plan says how many, not which.
Whoever ends, yields or starts over meanwhile is still in a step under way: what that step says of it is told
from what a later one says by the epoch of its admission, and its last event waits until its last step is
committed, so that its bill is whole.

It knows no clock, no device and no text. Time is an argument; the same calls give byte-identical plans.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from .blocks import BlockPool
from .cost import StepCost
from .draft import Draft
from .errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from .flights import Flight, Flights
from .plan import Admission, Event, Failure, Outcome, Plan, PlanItem, StepResult
from .policy import Policy, create_policy
from .prefix import Prefixes
from .request import Request, State
from .request_spec import FinishReason, RequestSpec
from .roll import Roll
from .stats import Totals

Drafter = Callable[[Request, int], Sequence[int]]
"""(request, most) → at most so many guesses of its next token ids"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler. All counts are per engine."""

    max_num_seqs: int
    """Most requests in one step."""
    max_num_batched_tokens: int
    """Token budget of one step."""
    max_model_len: int
    """Longest sequence, prompt and output together."""
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in one step; 0 means no limit of its own."""
    max_num_mixed_prefill_tokens: int = 0
    """Most tokens of all prompts in a step that also decodes, besides PROMPT_TOKENS_PER_DECODE for each
    request that does; 0 means no limit of its own."""
    policy: str = "fcfs"
    max_num_queued_reqs: int | None = None
    """Most requests left waiting after a step was planned."""
    max_num_queued_tokens: int | None = None
    """Most prompt tokens left waiting after a step was planned."""
    watermark: float = 0.01
    """Share of blocks that admission leaves to the requests that already run."""


class Scheduler:
    """Schedules one engine. See the module's rules.

    Args:
        config: limits.
        pool: the blocks of the KV cache.
        cost: model that divides each step's seconds among its requests; learns from every commit.
        policy: overrides config.policy with an object.
        drafter: guesses tokens, to be verified several at a time; called for requests that decode.
        features: what the device can do of `RequestSpec.needs`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        cost: StepCost | None = None,
        policy: Policy | None = None,
        drafter: Drafter | None = None,
        features: Collection[str] = (),
    ) -> None:
        self.config = config
        self.pool = pool
        self.cost = cost or StepCost()
        self.policy = policy or create_policy(config.policy)
        self.totals = Totals()
        self._drafter = drafter
        self._features = frozenset(features)
        self._prefixes = Prefixes(pool, config.enable_prefix_caching)
        self._epochs = 0
        self._roll = Roll(pool, self.policy)
        self._flights = Flights()
        self._events: list[Event] = []

    @property
    def numbers(self) -> tuple[int, int]:
        """Of the next step and the next admission."""
        return self.totals.steps, self._epochs

    def reset(self, numbers: tuple[int, int] | None = None) -> list[Event]:
        """Forget everybody, and what the blocks hold. For a caller who was interrupted anywhere: nothing that
        was planned or half taken in may be built on.

        numbers: to go on with, for a replay of such a run.

        Returns everybody's last event: `abort`, for those who had not ended, with the bill of all committed
        steps.
        """
        if numbers is not None:
            self.totals.steps, self._epochs = numbers
        events = self.take_events()
        gone, self._roll = self._roll, Roll(self.pool, self.policy)
        self._roll.released += (*gone.released, *gone.requests)  # the executor may have any of them
        self._flights = Flights()
        self.pool.reset()
        return events + gone.last_events()

    # ------------------------------------------------------------------ what is there

    @property
    def running(self) -> Sequence[Request]:
        """Requests that hold blocks, in policy order; not to be changed."""
        return self._roll.running

    @property
    def waiting(self) -> int:
        """Number of requests that hold none."""
        return len(self._roll.queue) + self._roll.queue.held

    @property
    def deferred(self) -> int:
        """Waiting requests that are held back until their leader has computed the prompt."""
        return self._roll.queue.held

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or has a step under way."""
        return bool(self._roll.requests)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of this id is here."""
        return request_id in self._roll.requests

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Ids of all requests that are here, in order of arrival."""
        return tuple(self._roll.requests)

    def backlog(self) -> tuple[int, int]:
        """Tokens still to be computed of prompts, and at most to be generated, of all who run or wait. One
        that was preempted counts as if it began anew: so those who wait need not be looked at."""
        running, queue = self._roll.running, self._roll.queue
        return (
            queue.prompt_tokens + sum(max(0, each.prompt_len - each.computed) for each in running),
            queue.max_tokens + sum(each.max_tokens - each.generated for each in running),
        )

    # ------------------------------------------------------------------ coming and going

    def add(self, spec: RequestSpec, now: float) -> None:
        """Put the sequences of a new request into the queue: all of them or, with an error, none.

        Raises ContextLengthExceeded or InvalidRequest when it could never run here.
        """
        spec.check()
        missing = sorted(spec.needs - self._features)
        if missing:
            raise UnsupportedParameter(
                f"this engine cannot serve what the request needs: {', '.join(missing)}.", param=missing[0]
            )
        limit = self.config.max_model_len
        for prompt in spec.prompts:
            length = len(prompt.token_ids)
            if length + prompt.max_tokens > limit:
                raise ContextLengthExceeded(
                    f"prompt ({length} tokens) and max_tokens ({prompt.max_tokens}) together are "
                    f"longer than the context of {limit} tokens.",
                    param="max_tokens",
                )
            if self.pool.blocks_for(length + prompt.max_tokens) > self.pool.num_blocks:
                raise ContextLengthExceeded(
                    f"the request may grow to {length + prompt.max_tokens} tokens, but the whole KV cache "
                    f"holds {self.pool.num_blocks * self.pool.block_size}.",
                    param="max_tokens",
                    advice="Ask for fewer tokens, or start the server with more KV cache.",
                )
        requests = Request.of(spec)
        for request in requests:
            if request.id in self._roll.requests:
                raise InvalidRequest(f"request id {request.id!r} is already in use.", param="request_id")
        self._roll.view.now = now
        for request in requests:
            self._roll.enter(request)

    def abort(self, request_id: str, now: float) -> Event | None:
        """End a request now. Its last event; None if it is not here (any more), or if it comes with a step
        that is under way."""
        request = self._roll.requests.get(request_id)
        if request is None or request.state is State.FINISHED:
            return None
        return self._roll.finish(request, Event(request_id, finish=FinishReason.ABORT, at=now))

    # ------------------------------------------------------------------ one step

    def schedule(self, now: float) -> Plan:
        """Plan the next step. A plan without items means that there is nothing to do."""
        self._roll.view.now = now
        self._roll.sort()
        draft = Draft(self.config.max_num_batched_tokens, self.config.max_num_batched_tokens)
        self._continue_running(draft)
        if not draft.preempted:
            self._admit_waiting(draft, now)
        self._refuse_overflow(now)
        if not draft.items:
            return Plan(step=self.totals.steps)
        plan = Plan(
            step=self.totals.steps,
            admitted=tuple(draft.admitted),
            items=tuple(draft.items),
            released=tuple(self._roll.released),
        )
        self._flights.begin(plan, [request.blocks for request in draft.requests])
        self._roll.released.clear()
        self.totals.steps += 1
        return plan

    def commit(self, plan: Plan, result: StepResult, now: float) -> list[Event]:
        """Take in what the step did. Results for requests that have ended meanwhile are dropped.

        Raises ValueError for another plan than the oldest one under way.
        """
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

    def take_events(self) -> list[Event]:
        """Events that arose outside of commit: refusals by schedule()."""
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self._roll.check()
        assert len(self.running) <= self.config.max_num_seqs
        for request in self._roll.requests.values():
            assert request.inflight == self._flights.count(request.id)

    # ------------------------------------------------------------------ rules 1 to 3

    def _continue_running(self, draft: Draft) -> None:
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self._roll.running:
            left = len(request.tokens) + request.pending - request.computed
            if left == 1:
                decoding.append(request)
            elif left > 1:
                prefilling.append(request)
        for request in decoding:
            self._decode(request, draft)
        draft.limit_prompts(self.config.max_num_mixed_prefill_tokens)
        for request in prefilling:
            count = self._chunk(request, draft)
            if count and request.state is State.RUNNING and self._grow(request, count, draft):
                self._put(draft, request, count, self._new_blocks(request, count))
        # only now: a victim above may have lost its place in this plan
        for request, item in zip(draft.requests, draft.items, strict=True):
            self._advance(request, item)

    def _decode(self, request: Request, draft: Draft) -> None:
        """Plan the next token of a running request, and guesses of those after it, unless it was preempted
        or has all it may get."""
        if request.state is not State.RUNNING or draft.budget <= 0 or request.speculating:
            return
        if request.spec.pooling is not None:  # the last token of its prompt
            if self._grow(request, 1, draft):
                self._put(draft, request, 1, self._new_blocks(request, 1))
            return
        most = request.max_len - len(request.tokens) - request.pending
        if most <= 0:
            return
        drafts: tuple[int, ...] = ()
        if self._drafter is not None and most > 1 and not request.pending:
            drafts = tuple(self._drafter(request, min(most, draft.budget) - 1))
        count = 1 + len(drafts)
        blocks: tuple[int, ...] = ()
        if request.computed + count > len(request.blocks) * self.pool.block_size:
            if not self._grow(request, count, draft):
                return
            blocks = self._new_blocks(request, count)
        item = PlanItem(request.id, request.epoch, request.computed, count, blocks, count, drafts)
        draft.decode(request, item)

    def _chunk(self, request: Request, draft: Draft) -> int:
        """Tokens of its prompt that this step computes."""
        wanted = min(request.target - request.computed, draft.room)
        limit = self.config.long_prefill_token_threshold
        return min(wanted, limit) if limit > 0 else wanted

    def _grow(self, request: Request, count: int, draft: Draft) -> bool:
        """Preempt until there are blocks for so many more tokens; False if the request itself had to go."""
        missing = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        while missing > self.pool.available:
            victim = self.policy.victim(self._roll.running, self._roll.view)
            draft.preempted = True
            draft.drop(victim)
            victim.preemptions += 1
            self.totals.preemptions += 1
            self._roll.send_back(victim)
            if victim is request:
                return False
        return True

    def _new_blocks(self, request: Request, count: int) -> tuple[int, ...]:
        missing = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        blocks = self.pool.allocate(missing) if missing > 0 else []
        request.blocks.extend(blocks)
        return tuple(blocks)

    # ------------------------------------------------------------------ rules 4 to 6

    def _admit_waiting(self, draft: Draft, now: float) -> None:
        queue, running = self._roll.queue, self._roll.running
        position = 0
        while position < len(queue) and draft.room > 0 and len(running) < self.config.max_num_seqs:
            request = queue[position]
            if request.pending:  # preempted, and its token is under way
                position += 1
                continue
            hits = self._prefixes.hits(request)
            needed = self.pool.blocks_for(request.target) - len(hits)
            taken = needed + self.pool.unreferenced(hits)
            reserve = int(self.config.watermark * self.pool.num_blocks) if running else 0
            if taken + reserve > self.pool.available:
                break
            queue.take(position)
            self._admit(draft, request, hits, needed, now)

    def _admit(self, draft: Draft, request: Request, hits: list[int], needed: int, now: float) -> None:
        self.pool.share(hits)
        request.blocks = hits + self.pool.allocate(needed)
        request.computed = len(hits) * self.pool.block_size
        request.registered = len(hits)
        self._roll.run(request, self._epochs)
        self._epochs += 1
        if request.cached is None:
            request.tokens = request.tokens.copy()  # until now its prompt's, which all siblings share
            request.reached = request.computed
            request.cached = min(request.computed, request.prompt_len)
            request.scheduled_at = now
            self.totals.cached_tokens += request.cached
            self.totals.prefix_queries += len(request.tokens)
            self.totals.prefix_hits += request.computed
        generated = tuple(request.tokens[request.prompt_len :])
        draft.admitted.append(Admission(request.id, request.epoch, request.spec, request.index, generated))
        self._put(draft, request, self._chunk(request, draft), tuple(request.blocks))
        self._advance(request, draft.items[-1])

    def _refuse_overflow(self, now: float) -> None:
        config, queue = self.config, self._roll.queue
        for request, bound in queue.overflow(config.max_num_queued_reqs, config.max_num_queued_tokens):
            waiting, tokens = queue.fresh, queue.fresh_tokens
            failure = Failure(
                f"the queue is full: {waiting} requests with {tokens} prompt tokens already wait "
                f"(limit: {getattr(config, bound)} {_UNITS[bound]}).",
                type="QueueFull",
                param=bound,
            )
            self._roll.depart(request)
            self._events.append(Event(request.id, finish=FinishReason.ERROR, failure=failure, at=now))

    # ------------------------------------------------------------------ items

    def _put(self, draft: Draft, request: Request, count: int, blocks: tuple[int, ...]) -> None:
        """Plan so many tokens of what is known; at its end, one is sampled, or the whole is pooled."""
        ends = request.computed + count == request.target
        samples = int(ends and request.spec.pooling is None)
        pools = ends and not samples
        item = PlanItem(request.id, request.epoch, request.computed, count, blocks, samples, (), pools)
        draft.put(request, item)

    def _advance(self, request: Request, item: PlanItem) -> None:
        """Count the item as computed: the device works in order, so later plans may build on it."""
        start, end = item.start, item.start + item.tokens
        reached = request.reached
        if start < request.prompt_len or start < reached:
            self.totals.prompt_tokens += max(0, min(end, request.prompt_len) - max(start, reached))
            self.totals.recomputed_tokens += max(0, min(end, reached) - start)
        request.computed = end
        if end > reached:
            request.reached = end
        request.pending += item.samples
        request.speculating = bool(item.drafts)
        request.inflight += 1
        if min(end, len(request.tokens)) // self.pool.block_size > request.registered:
            self._prefixes.register(request)
        if request.followers and request.prompt_is_computed:
            self._roll.queue.release(request)

    # ------------------------------------------------------------------ results

    def _bill(self, plan: Plan, seconds: float, *, learn: bool) -> None:
        for item, share in zip(plan.items, self.cost.attribute(plan, seconds), strict=True):
            request = self._roll.requests[item.request]
            request.inflight -= 1
            request.device_seconds += share
            if self.policy.dynamic:
                self._roll.view.served[request.spec.tenant] += share
        if learn:
            self.cost.observe(plan, seconds)

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
        self.totals.generation_tokens += len(tokens)
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
        self.totals.drafted_tokens += len(item.drafts)
        self.totals.accepted_tokens += right - 1
        wrong = item.samples - right
        request.reached -= wrong
        if request.state is State.RUNNING:
            request.computed -= wrong

    def _stop(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        sampling = request.spec.sampling
        assert sampling is not None  # a request without is never sampled
        if token in request.stops and request.generated >= sampling.min_tokens:
            by_eos = token in request.spec.eos_ids and not sampling.ignore_eos
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
            first = item.start // self.pool.block_size
            worthless.update(table[first:])
            if failure.tainted:
                # those who share its earlier blocks are on their own; nobody else is to find them, nor what
                # anybody has built on them
                self.pool.unregister_all()
            request = self._roll.requests[item.request]
            if request.state is not State.FINISHED and request.epoch == item.epoch:
                event = Event(item.request, finish=FinishReason.ERROR, failure=failure, at=now)
                if (last := self._roll.finish(request, event)) is not None:
                    events.append(last)
        running = [(request.id, request.epoch, request.blocks) for request in self._roll.running]
        for request_id, epoch, spoiled in self._flights.standing_on(worthless, flight, running):
            # what was computed on worthless ground is worthless, too: it would be found once more when
            # somebody computes what it stands on again
            self.pool.unregister(spoiled)
            sharer = self._roll.requests.get(request_id)
            if sharer is not None and sharer.state is not State.FINISHED and sharer.epoch == epoch:
                self._roll.start_over(sharer)


_UNITS = {"max_num_queued_reqs": "requests", "max_num_queued_tokens": "tokens"}


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
