"""The scheduler: which tokens of which requests each step computes, in which blocks.

    add · abort · schedule(now) → Plan · commit(plan, result, now) → events

Rules of a step, in this order:

1. Requests that need one token (decode) go first, then the rest of prompts already begun, each in policy
   order. So a long prompt can never push a token stream out of a step; it takes what the token budget leaves.
2. No prompt takes more than `long_prefill_token_threshold` tokens of a step, and all prompts together, where
   others decode, take at most `max_num_mixed_prefill_tokens`, and four for each that decodes (0: no such
   limits). The latter bounds the gap between two tokens of a stream.
3. A running request that needs a block when none is available preempts the policy's victim, which may be
   itself. A victim loses its blocks, keeps its generated tokens, and goes back to the queue; its full blocks
   stay in the prefix index until they are evicted, so it usually resumes cheaply. What it had computed is
   copied to the host, if that has room and is cheaper than computing it again (`swap`).
4. If nobody was preempted, waiting requests are admitted in policy order, strictly: the first that does not
   fit ends admission, so nobody is starved by smaller ones. A request is admitted when blocks for all of its
   known tokens are available, and gets them at once.
5. Blocks enter the prefix index when they are scheduled, not when they are computed: a later request of the
   same step may share them, because executors write all keys and values of a layer before they read any.
6. What nobody waits for (`ServiceClass.BACKGROUND`) has what the rules above leave to it: tokens of the
   budget, blocks, and predicted seconds of the step (`background`). It decodes, goes on with prompts and is
   admitted after everybody else, and is preempted before anybody else, also to admit somebody in this step.
7. What still waits beyond the queue's bounds is refused, from the end of policy order, siblings with their
   leader.

Steps may be planned ahead: `schedule` may be called again before the last plan is committed (plans are
committed in order). A request then has tokens whose ids are not known yet; a plan says how many, not which.
Whoever ends, yields or starts over meanwhile is still in a step under way: what that step says of it is told
from what a later one says by the epoch of its admission, and its last event waits until its last step is
committed, so that its bill is whole.

What a result does to the requests of its step is in `results`. Neither knows a clock, a device or text: time
is an argument, and the same calls give byte-identical plans.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .background import Leftover
from .blocks import BlockPool
from .cost import StepCost
from .draft import Draft
from .errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from .flights import Flights
from .plan import Admission, Event, Failure, Plan, PlanItem, StepResult
from .policy import Policy, Slo, create_policy, is_background
from .prefix import Prefixes
from .request import Request, State
from .request_spec import FinishReason, RequestSpec
from .results import Results
from .roll import Roll
from .scheduler_config import SchedulerConfig as SchedulerConfig  # whoever makes one makes the other
from .stats import Totals
from .swap import Swaps

Drafter = Callable[[Request, int], Sequence[int]]
"""(request, most) → at most so many guesses of its next token ids"""


class Scheduler:
    """Schedules one engine. See the module's rules.

    Args:
        config: limits.
        pool: the blocks of the KV cache.
        cost: model that divides each step's seconds among its requests; learns from every commit.
        policy: overrides config.policy with an object.
        drafter: guesses tokens, to be verified several at a time; called for requests that decode.
        features: what the device can do of `RequestSpec.needs`.
        host_blocks: what it can keep of preempted requests in the host's memory.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        cost: StepCost | None = None,
        policy: Policy | None = None,
        drafter: Drafter | None = None,
        features: Collection[str] = (),
        host_blocks: int = 0,
    ) -> None:
        self.config = config
        self.pool = pool
        self.cost = cost or StepCost()
        self.policy = policy or create_policy(config.policy)
        self.totals = Totals()
        self._slo = Slo(config.slo_ttft, config.slo_itl)
        self._drafter = drafter
        self.features = frozenset(features)
        self._prefixes = Prefixes(pool, config.enable_prefix_caching)
        self._epochs = 0
        self.swaps = Swaps(host_blocks, pool.block_size, self.cost)
        self._events: list[Event] = []
        self._begin()

    def _begin(self) -> None:
        """Nobody is here, and no step under way."""
        self._roll = Roll(self.pool, self.policy, self.swaps)
        self._flights = Flights()
        self._results = Results(
            self._roll,
            self._flights,
            pool=self.pool,
            swaps=self.swaps,
            policy=self.policy,
            cost=self.cost,
            totals=self.totals,
        )

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
        gone = self._roll
        self._begin()
        self._roll.released += (*gone.released, *gone.requests)  # the executor may have any of them
        self.pool.reset()
        self.swaps.reset()
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
        missing = sorted(spec.needs - self.features)
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
        if self._roll.background:
            left = Leftover(self._slo, self.cost.coefficients, draft.items)
            self._continue_running(draft, left)
            if not draft.preempted and not draft.squeezed:
                self._admit_waiting(draft, now, left)
        self._refuse_overflow(now)
        if not draft.items:
            return Plan(step=self.totals.steps)
        plan = Plan(
            step=self.totals.steps,
            admitted=tuple(draft.admitted),
            items=tuple(draft.items),
            released=tuple(self._roll.released),
            swap_out=self.swaps.take_out(),
            swap_in=tuple(draft.swap_in),
        )
        self.totals.stored_blocks += len(plan.swap_out)
        self.totals.loaded_blocks += len(plan.swap_in)
        self._flights.begin(plan, [request.blocks for request in draft.requests])
        self._roll.released.clear()
        self.totals.steps += 1
        return plan

    def commit(self, plan: Plan, result: StepResult, now: float) -> list[Event]:
        """Take in what the step did. Results for requests that have ended meanwhile are dropped.

        Raises ValueError for another plan than the oldest one under way.
        """
        return self._results.take_in(plan, result, now)

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

    def _continue_running(self, draft: Draft, room: Leftover | None = None) -> None:
        """room: for what nobody waits for; without it, for everybody else."""
        decoding: list[Request] = []
        prefilling: list[Request] = []
        first, mixed = len(draft.items), self._roll.background
        for request in self._roll.running:
            if mixed and is_background(request) is not (room is not None):
                continue
            left = len(request.tokens) + request.pending - request.computed
            if left == 1:
                decoding.append(request)
            elif left > 1:
                prefilling.append(request)
        for request in decoding:
            if room is None or (draft.budget > 0 and room.decode(request.computed)):
                self._decode(request, draft)
        if room is None:  # else nobody minds a long step, or it was limited before
            draft.limit_prompts(self.config.max_num_mixed_prefill_tokens)
        for request in prefilling:
            count = self._chunk(request, draft, room)
            if count and request.state is State.RUNNING and self._grow(request, count, draft):
                self._put(draft, request, count, self._new_blocks(request, count))
        # only now: a victim above may have lost its place in this plan
        for request, item in zip(draft.requests[first:], draft.items[first:], strict=True):
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

    def _chunk(
        self, request: Request, draft: Draft, room: Leftover | None = None, start: int | None = None
    ) -> int:
        """Tokens of its prompt that this step computes. start: how many are computed, where that is not so
        yet."""
        start = request.computed if start is None else start
        rest = request.target - start
        if self.config.whole_prompts:
            return rest if room is None else room.chunk(start, rest, whole=True)
        wanted = min(rest, draft.room)
        limit = self.config.long_prefill_token_threshold
        wanted = min(wanted, limit) if limit > 0 else wanted
        return wanted if room is None else room.chunk(start, wanted)

    def _grow(self, request: Request, count: int, draft: Draft) -> bool:
        """Preempt until there are blocks for so many more tokens; False if the request itself had to go."""
        missing = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        while missing > self.pool.available:
            victim = self.policy.victim(self._roll.running, self._roll.view)
            self._preempt(victim, draft)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, draft: Draft) -> None:
        if is_background(victim):
            draft.squeezed = True
        else:
            draft.preempted = True
        draft.drop(victim)
        victim.preemptions += 1
        self.totals.preemptions += 1
        if self.swaps.worth(victim):
            self.swaps.out(victim, self.totals.steps)
        self._roll.send_back(victim)

    def _new_blocks(self, request: Request, count: int) -> tuple[int, ...]:
        missing = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        blocks = self.pool.allocate(missing) if missing > 0 else []
        request.blocks.extend(blocks)
        return tuple(blocks)

    # ------------------------------------------------------------------ rules 4 to 6

    def _admit_waiting(self, draft: Draft, now: float, room: Leftover | None = None) -> None:
        queue = self._roll.queue
        position = 0
        while position < len(queue) and draft.room > 0:
            request = queue[position]
            if request.pending:  # preempted, and its token is under way
                position += 1
                continue
            if is_background(request) is not (room is not None):
                break  # all others are, too; or somebody is waited for who does not fit
            if self.config.whole_prompts and draft.items and request.target > draft.room:
                break
            while True:
                fits, missing, hits = self._fits(request)
                if fits:
                    break
                if room is not None or not self._squeeze(missing, draft):
                    return
            count = None
            if room is not None:
                count = self._chunk(request, draft, room, len(hits) * self.pool.block_size)
                if not count:
                    return
            queue.take(position)
            self._admit(draft, request, hits, now, count)

    def _fits(self, request: Request) -> tuple[bool, int, list[int]]:
        """Whether a waiting request may be admitted as things are, how many blocks are missing, and those
        that hold the beginning of it."""
        running = self._roll.running
        hits = self._prefixes.hits(request)
        needed = self.pool.blocks_for(request.target) - len(hits)
        taken = needed + self.pool.unreferenced(hits)
        reserve = int(self.config.watermark * self.pool.num_blocks) if running else 0
        missing = max(0, taken + reserve - self.pool.available)
        return not missing and len(running) < self.config.max_num_seqs, missing, hits

    def _squeeze(self, missing: int, draft: Draft) -> bool:
        """Have background work yield for somebody who is waited for; False if that would not help."""
        if not self._roll.background:
            return False
        held = [len(each.blocks) for each in self._roll.running if is_background(each)]
        if not held or sum(held) < missing:
            return False
        self._preempt(self._roll.running[-1], draft)
        return True

    def _admit(self, draft: Draft, request: Request, hits: list[int], now: float, count: int | None) -> None:
        """count: tokens of it in this step, where those are already taken of what is left."""
        needed = self.pool.blocks_for(request.target) - len(hits)
        self.pool.share(hits)
        request.blocks = hits + self.pool.allocate(needed)
        request.computed = len(hits) * self.pool.block_size
        request.registered = len(hits)
        draft.swap_in += self.swaps.back(request, len(hits))
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
        count = self._chunk(request, draft) if count is None else count
        self._put(draft, request, count, tuple(request.blocks))
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


_UNITS = {"max_num_queued_reqs": "requests", "max_num_queued_tokens": "tokens"}
