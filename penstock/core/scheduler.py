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

It knows no clock, no device and no text. Time is an argument; the same calls give byte-identical plans.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from .blocks import BlockPool, hash_block
from .cost import StepCost
from .errors import ContextLengthExceeded, InvalidRequest
from .plan import Admission, Event, Plan, PlanItem, StepResult, TokenLogprob
from .policy import Policy, create_policy
from .request import FinishReason, Request, State

PROMPT_TOKENS_PER_DECODE = 4
"""Where prompts are limited in a step that also decodes, each request that decodes lets so many more pass: it
makes the step longer by itself, and more prompts wait behind more requests."""


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


@dataclass(slots=True)
class Totals:
    """Counters since the start."""

    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix index."""
    prefix_hits: int = 0
    """Tokens found there."""
    prompt_tokens: int = 0
    """Prompt tokens computed for the first time."""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    generation_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens of newly admitted requests found in the prefix index."""


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    """Tokens left."""
    prompts: int
    """Tokens that prompts may still take, as far as the budget goes."""
    items: dict[str, PlanItem] = field(default_factory=dict)
    admitted: list[Admission] = field(default_factory=list)
    preempted: bool = False

    @property
    def room(self) -> int:
        """Tokens left for prompts."""
        return min(self.budget, self.prompts)

    def drop(self, request: str) -> None:
        """Take back what was planned for this request, if anything was."""
        item = self.items.pop(request, None)
        if item is not None:
            self.budget += item.tokens
            self.prompts += item.tokens if _of_prompt(item) else 0


def _of_prompt(item: PlanItem) -> bool:
    """Whether it is counted as a prompt's; the last token of one is counted as decode."""
    return item.tokens > 1 or not item.sample


class Scheduler:
    """Schedules one engine. See the module's rules.

    Args:
        config: limits.
        pool: the blocks of the KV cache.
        cost: model that divides each step's seconds among its requests; learns from every commit.
        policy: overrides config.policy with an object.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        cost: StepCost | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.config = config
        self.pool = pool
        self.cost = cost or StepCost()
        self.policy = policy or create_policy(config.policy)
        self.totals = Totals()
        self.unbilled = 0.0
        """Seconds of steps that fell to requests which had ended meanwhile."""
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._arrivals = 0
        self._released: list[str] = []
        self._events: list[Event] = []
        self._prompt_logprobs: dict[str, list[TokenLogprob]] = {}

    # ------------------------------------------------------------------ what is there

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that hold blocks, in policy order."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests in the queue, in policy order."""
        return tuple(self._waiting)

    @property
    def deferred(self) -> int:
        """Waiting requests that are held back until their leader has computed the prompt."""
        return sum(1 for request in self._waiting if not self._leader_is_ready(request))

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Ids of all requests that are here, in order of arrival."""
        return tuple(self._requests)

    # ------------------------------------------------------------------ coming and going

    def add(self, request: Request, now: float) -> None:
        """Put a new request into the queue.

        Raises ContextLengthExceeded or InvalidRequest when it could never run here.
        """
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is already in use.", param="request_id")
        if not request.prompt:
            raise InvalidRequest("the prompt is empty.", param="prompt")
        limit = self.config.max_model_len
        if request.prompt_len + request.max_tokens > limit:
            raise ContextLengthExceeded(
                f"prompt ({request.prompt_len} tokens) and max_tokens ({request.max_tokens}) together are "
                f"longer than the context of {limit} tokens.",
                param="max_tokens",
            )
        if self.pool.blocks_for(request.max_len) > self.pool.num_blocks:
            raise ContextLengthExceeded(
                f"the request may grow to {request.max_len} tokens, but the whole KV cache holds "
                f"{self.pool.num_blocks * self.pool.block_size}.",
                param="max_tokens",
                advice="Ask for fewer tokens, or start the server with more KV cache.",
            )
        request.arrival = self._arrivals
        self._arrivals += 1
        request.arrived_at = min(request.arrived_at, now) if request.arrived_at else now
        self._requests[request.id] = request
        if request.leader in self._requests:
            self._requests[request.leader].has_siblings = True
        insort(self._waiting, request, key=self.policy.order)

    def abort(self, request_id: str, now: float) -> Event | None:
        """End a request now; its last event, or None if it is not here (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._finish(request, now, FinishReason.ABORT)

    # ------------------------------------------------------------------ one step

    def schedule(self, now: float) -> Plan:
        """Plan the next step. A plan without items means that there is nothing to do."""
        draft = _Draft(self.config.max_num_batched_tokens, self.config.max_num_batched_tokens)
        self._continue_running(draft)
        if not draft.preempted:
            self._admit_waiting(draft, now)
        self._refuse_overflow(now)
        if not draft.items:
            return Plan(step=self.totals.steps)
        plan = Plan(
            step=self.totals.steps,
            admitted=tuple(draft.admitted),
            items=tuple(draft.items.values()),
            released=tuple(self._released),
        )
        self._released.clear()
        self.totals.steps += 1
        return plan

    def commit(self, plan: Plan, result: StepResult, now: float) -> list[Event]:
        """Take in what the step did. Results for requests that have ended meanwhile are dropped."""
        self._bill(plan, result)
        events: list[Event] = []
        stale = self._fail(plan, result, now, events)
        for item in plan.items:
            request = self._requests.get(item.request)
            if request is None or item.request in stale:
                continue
            if item.request in result.prompt_logprobs:
                self._prompt_logprobs.setdefault(item.request, []).extend(
                    result.prompt_logprobs[item.request]
                )
            if item.sample:
                events.append(self._append(request, result, now))
        return events

    def take_events(self) -> list[Event]:
        """Events that arose outside of commit: refusals by schedule()."""
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self.pool.check(request.blocks for request in self._running)
        assert len(self._running) + len(self._waiting) == len(self._requests)
        assert len(self._running) <= self.config.max_num_seqs
        for queue, state in ((self._running, State.RUNNING), (self._waiting, State.WAITING)):
            keys = [self.policy.order(request) for request in queue]
            assert keys == sorted(keys)
            for request in queue:
                assert self._requests[request.id] is request
                assert request.state is state
                assert 0 <= request.computed <= request.target
                assert request.generated + request.pending <= request.max_tokens
                assert len(request.blocks) * self.pool.block_size >= request.computed
                assert state is State.RUNNING or not request.blocks

    # ------------------------------------------------------------------ rules 1 to 3

    def _continue_running(self, draft: _Draft) -> None:
        decoding = [r for r in self._running if r.target - r.computed == 1]
        prefilling = [r for r in self._running if r.target - r.computed > 1]
        for request in decoding:
            self._continue(request, min(1, draft.budget), draft)
        if draft.items and self.config.max_num_mixed_prefill_tokens:
            more = PROMPT_TOKENS_PER_DECODE * len(draft.items)
            draft.prompts = self.config.max_num_mixed_prefill_tokens + more
        for request in prefilling:
            self._continue(request, self._chunk(request, draft), draft)
        # only now: a victim above may have lost its place in this plan
        for item in draft.items.values():
            self._advance(self._requests[item.request], item)

    def _continue(self, request: Request, count: int, draft: _Draft) -> None:
        """Plan `count` more tokens of a running request, unless it was preempted or has all it may get."""
        full = request.generated + request.pending >= request.max_tokens
        if count == 0 or full or request.state is not State.RUNNING:
            return
        missing = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        if not self._make_room(request, missing, draft):
            return
        blocks = self.pool.allocate(missing) if missing > 0 else []
        request.blocks.extend(blocks)
        self._put(draft, request, count, tuple(blocks))

    def _chunk(self, request: Request, draft: _Draft) -> int:
        """Tokens of its prompt that this step computes."""
        wanted = min(request.target - request.computed, draft.room)
        limit = self.config.long_prefill_token_threshold
        return min(wanted, limit) if limit > 0 else wanted

    def _make_room(self, request: Request, missing: int, draft: _Draft) -> bool:
        """Preempt until `missing` blocks are available; False if the request itself had to go."""
        while missing > self.pool.available:
            victim = self.policy.victim(self._running)
            draft.preempted = True
            draft.drop(victim.id)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        request.preemptions += 1
        self.totals.preemptions += 1
        self._send_back(request)

    def _send_back(self, request: Request) -> None:
        self._running.remove(request)
        self._drop_blocks(request)
        request.state = State.WAITING
        insort(self._waiting, request, key=self.policy.order)

    def _drop_blocks(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks.clear()
        request.computed = 0
        request.registered = 0
        self._released.append(request.id)
        self._prompt_logprobs.pop(request.id, None)

    # ------------------------------------------------------------------ rules 4 to 6

    def _admit_waiting(self, draft: _Draft, now: float) -> None:
        position = 0
        while position < len(self._waiting) and draft.room > 0:
            if len(self._running) >= self.config.max_num_seqs:
                break
            request = self._waiting[position]
            if request.pending or not self._leader_is_ready(request):
                position += 1
                continue
            hits = self._prefix_hits(request)
            needed = self.pool.blocks_for(request.target) - len(hits)
            taken = needed + self.pool.unreferenced(hits)
            reserve = int(self.config.watermark * self.pool.num_blocks) if self._running else 0
            if taken + reserve > self.pool.available:
                break
            del self._waiting[position]
            self._admit(draft, request, hits, needed, now)

    def _admit(self, draft: _Draft, request: Request, hits: list[int], needed: int, now: float) -> None:
        self.pool.share(hits)
        request.blocks = hits + self.pool.allocate(needed)
        request.computed = len(hits) * self.pool.block_size
        request.registered = len(hits)
        request.state = State.RUNNING
        insort(self._running, request, key=self.policy.order)
        if request.cached is None:
            request.cached = request.reached = request.computed
            request.scheduled_at = now
            self.totals.cached_tokens += request.computed
            self.totals.prefix_queries += len(request.tokens)
            self.totals.prefix_hits += request.computed
        draft.admitted.append(
            Admission(
                request=request.id,
                tokens=tuple(request.tokens),
                prompt_len=request.prompt_len,
                params=request.params,
                eos_ids=tuple(sorted(request.eos_ids)),
            )
        )
        self._put(draft, request, self._chunk(request, draft), tuple(request.blocks))
        self._advance(request, draft.items[request.id])

    def _leader_is_ready(self, request: Request) -> bool:
        """Whether the prompt that this request shares lies in the cache (or will never do so)."""
        leader = self._requests.get(request.leader) if request.leader else None
        return leader is None or leader.computed >= leader.prompt_len or leader.generated > 0

    def _prefix_hits(self, request: Request) -> list[int]:
        """Blocks that already hold a prefix of the request; at least one token is left to compute."""
        if not self._caches(request):
            return []
        if request.params.prompt_logprobs is not None and request.generated == 0:
            return []  # every prompt position must pass through the model
        full = (len(request.tokens) - 1) // self.pool.block_size
        return self.pool.lookup(self._hashes(request, full)[:full])

    def _caches(self, request: Request) -> bool:
        """With prefix caching off, only the siblings of one n > 1 request share."""
        return self.config.enable_prefix_caching or request.has_siblings or request.leader is not None

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        size = self.pool.block_size
        salt = request.cache_salt
        if not self.config.enable_prefix_caching:
            salt = f"{salt}\0{request.leader or request.id}"
        while len(request.hashes) < count:
            start = len(request.hashes) * size
            parent = request.hashes[-1] if request.hashes else b""
            request.hashes.append(hash_block(parent, request.tokens[start : start + size], salt))
        return request.hashes

    def _refuse_overflow(self, now: float) -> None:
        most, most_tokens = self.config.max_num_queued_reqs, self.config.max_num_queued_tokens
        if most is None and most_tokens is None:
            return
        # siblings stand and fall with their leader; preempted requests were already accepted
        fresh = [r for r in self._waiting if r.cached is None and r.leader is None]
        tokens = sum(request.prompt_len for request in fresh)
        while fresh and (
            (most is not None and len(fresh) > most) or (most_tokens is not None and tokens > most_tokens)
        ):
            by_count = most is not None and len(fresh) > most
            limit = f"--max-num-queued-reqs {most}" if by_count else f"--max-num-queued-tokens {most_tokens}"
            request = fresh.pop()
            message = (
                f"the queue is full: {len(fresh)} requests with {tokens - request.prompt_len} prompt tokens "
                f"already wait (limit: {limit})."
            )
            tokens -= request.prompt_len
            for refused in (request, *[r for r in self._waiting if r.leader == request.id]):
                self._events.append(
                    self._finish(refused, now, FinishReason.ERROR, error=message, error_type="QueueFull")
                )

    # ------------------------------------------------------------------ items

    def _put(self, draft: _Draft, request: Request, count: int, blocks: tuple[int, ...]) -> None:
        item = PlanItem(
            request=request.id,
            start=request.computed,
            tokens=count,
            blocks=blocks,
            sample=request.computed + count == request.target,
        )
        draft.budget -= count
        draft.prompts -= count if _of_prompt(item) else 0
        draft.items[request.id] = item

    def _advance(self, request: Request, item: PlanItem) -> None:
        """Count the item as computed: the device works in order, so later plans may build on it."""
        end = item.start + item.tokens
        self.totals.prompt_tokens += max(0, min(end, request.prompt_len) - max(item.start, request.reached))
        self.totals.recomputed_tokens += max(0, min(end, request.reached) - item.start)
        request.computed = end
        request.reached = max(request.reached, end)
        request.pending += item.sample
        if self._caches(request):
            full = min(request.computed, len(request.tokens)) // self.pool.block_size
            hashes = self._hashes(request, full)
            for index in range(request.registered, full):
                self.pool.register(request.blocks[index], hashes[index])
            request.registered = max(request.registered, full)

    # ------------------------------------------------------------------ results

    def _bill(self, plan: Plan, result: StepResult) -> None:
        for request_id, share in self.cost.attribute(plan, result.seconds).items():
            request = self._requests.get(request_id)
            if request is None:
                self.unbilled += share
            else:
                request.device_seconds += share
        if result.regular and not result.errors:
            self.cost.observe(plan, result.seconds)

    def _append(self, request: Request, result: StepResult, now: float) -> Event:
        request.pending -= 1
        token = result.tokens[request.id]
        request.tokens.append(token)
        self.totals.generation_tokens += 1
        if request.first_token_at is None:
            request.first_token_at = now
        finish, stop_reason = self._stop(request, token)
        logprob = result.logprobs.get(request.id)
        prompt_logprobs = self._prompt_logprobs.pop(request.id, None) if request.generated == 1 else None
        return self._event(
            request,
            now,
            tokens=(token,),
            logprobs=(logprob,) if logprob is not None else (),
            prompt_logprobs=tuple(prompt_logprobs) if prompt_logprobs is not None else None,
            finish=finish,
            stop_reason=stop_reason,
        )

    def _stop(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        if request.generated >= request.params.min_tokens:
            if token in request.eos_ids:
                return FinishReason.STOP, None
            if token in request.params.stop_token_ids:
                return FinishReason.STOP, token
        if request.generated >= request.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _fail(self, plan: Plan, result: StepResult, now: float, events: list[Event]) -> set[str]:
        """End requests that failed in this step; requests that shared blocks which were never filled start
        over. Returns the ids of the latter, whose results of this step mean nothing."""
        if not result.errors and all(
            item.request in result.tokens
            for item in plan.items
            if item.sample and item.request in self._requests
        ):
            return set()
        worthless: set[int] = set()
        for item in plan.items:
            request = self._requests.get(item.request)
            cause = result.errors.get(item.request)
            if cause is None and item.sample and item.request not in result.tokens:
                cause = "the executor returned no token for it"
            if request is None or cause is None:
                continue
            first = item.start // self.pool.block_size
            for block in request.blocks[first:]:
                self.pool.unregister(block)
                worthless.add(block)
            if item.request in result.tainted:
                # those who share these blocks already are on their own; nobody else is to find them
                for block in request.blocks[:first]:
                    self.pool.unregister(block)
            error_type = result.error_types.get(item.request, "RequestFailed")
            events.append(self._finish(request, now, FinishReason.ERROR, error=cause, error_type=error_type))
        stale = [request for request in self._running if not worthless.isdisjoint(request.blocks)]
        for request in stale:
            request.pending = 0
            for index, block in enumerate(request.blocks):
                # what it computed itself stands on worthless ground, too
                if block in worthless:
                    for later in request.blocks[index:]:
                        self.pool.unregister(later)
                    break
            self._send_back(request)
        return {request.id for request in stale}

    def _finish(
        self,
        request: Request,
        now: float,
        reason: FinishReason,
        *,
        error: str | None = None,
        error_type: str = "RequestFailed",
    ) -> Event:
        self._leave(request)
        return self._event(request, now, finish=reason, error=error, error_type=error_type)

    def _leave(self, request: Request) -> None:
        if request.state is State.RUNNING:
            self._running.remove(request)
            self._drop_blocks(request)
        else:
            self._waiting.remove(request)
        self._prompt_logprobs.pop(request.id, None)
        request.state = State.FINISHED
        del self._requests[request.id]

    def _event(
        self,
        request: Request,
        now: float,
        *,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob, ...] | None = None,
        finish: FinishReason | None = None,
        stop_reason: int | None = None,
        error: str | None = None,
        error_type: str = "RequestFailed",
    ) -> Event:
        if finish is not None and request.state is not State.FINISHED:
            self._leave(request)
        return Event(
            request=request.id,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            stop_reason=stop_reason,
            error=error,
            error_type=error_type,
            at=now,
            scheduled_at=request.scheduled_at,
            cached=request.cached or 0,
            device_seconds=request.device_seconds,
            preemptions=request.preemptions,
        )
