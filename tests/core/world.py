"""A scheduler in a world without devices: it draws tokens, checks every invariant, and keeps the plan log."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepCost
from penstock.core.plan import (
    Admission,
    Event,
    Failure,
    Outcome,
    Plan,
    PlanItem,
    StepResult,
    TokenLogprob,
)
from penstock.core.policy import Policy
from penstock.core.pooling import Vectors
from penstock.core.request import Request
from penstock.core.request_spec import Pooling, Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import Drafter, Scheduler, SchedulerConfig
from penstock.core.simulated import FEATURES


def config(**changes: object) -> SchedulerConfig:
    """Small limits, so that every one of them is hit."""
    values: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        **changes,
    }
    return SchedulerConfig(**values)  # type: ignore[arg-type]


def request(name: str, prompt: list[int] | int, max_tokens: int = 8, **fields: object) -> RequestSpec:
    """A request; an int prompt means that many distinct tokens."""
    tokens = tuple(range(1000, 1000 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    if isinstance(fields.get("pooling"), Pooling):
        max_tokens = 0
    else:
        fields.setdefault("sampling", Sampling())
    inputs = fields.pop("inputs", ())
    return RequestSpec(id=name, prompts=(Prompt(tokens, max_tokens, inputs),), **fields)  # type: ignore[arg-type]


def step_result(plan: Plan, *tokens: Sequence[int], seconds: float = 1.0) -> StepResult:
    """A result in which the plan's items got these tokens."""
    return StepResult(plan.step, seconds, tuple(Outcome(tuple(each)) for each in tokens))


class World:
    """Runs a scheduler; token t of a request is a function of its content only, as in a greedy model.

    With a depth of 2, a step is planned and played before the one before it is committed.
    """

    def __init__(
        self,
        settings: SchedulerConfig,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        depth: int = 1,
        policy: Policy | None = None,
        drafter: Drafter | None = None,
        host_blocks: int = 0,
        cost: StepCost | None = None,
    ) -> None:
        pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(
            settings,
            pool,
            cost,
            policy=policy,
            drafter=drafter,
            features=FEATURES,
            host_blocks=host_blocks,
        )
        self.now = 0.0
        self.log: list[str] = []
        self.specs: dict[str, RequestSpec] = {}
        self.events: list[Event] = []
        self.rows: dict[str, list[int]] = {}
        self.admissions: dict[str, Admission] = {}
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[int, tuple[int, ...]] = {}
        """block id → the tokens whose keys and values it holds: what a device would have written. A negative
        one is worthless: nothing was written, or on top of what is worthless."""
        self.host: dict[int, tuple[int, ...]] = {}
        """host block id → what it holds, as `computed`."""
        self._depth = depth
        self._flights: deque[tuple[Plan, StepResult]] = deque()

    def add(self, new: RequestSpec) -> None:
        self.specs[new.id] = new
        self.scheduler.add(new, self.now)
        self.scheduler.check()

    def abort(self, name: str) -> None:
        event = self.scheduler.abort(name, self.now)
        if event is not None:
            self.events.append(event)
        self.scheduler.check()

    @property
    def flights(self) -> list[Plan]:
        """Plans that are under way, the oldest first."""
        return [plan for plan, _ in self._flights]

    def plan(self, failing: frozenset[str] = frozenset()) -> Plan:
        """Plan a step and play it; requests in `failing` fail in it, without having written anything."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check()
        self.events.extend(self.scheduler.take_events())
        if plan.items:
            self.log.append(plan.to_json())
            self._flights.append((plan, self._play(plan, failing)))
        return plan

    def step(self, failing: frozenset[str] = frozenset()) -> Plan:
        """Plan until enough steps are under way, and commit the oldest; gives the one planned last, if it has
        items, else the one committed."""
        plan = Plan(-1)
        while len(self._flights) < self._depth:
            plan = self.plan(failing)
            if not plan.items:
                break
        if self._flights:
            done, result = self._flights.popleft()
            self.events.extend(self.scheduler.commit(done, result, self.now))
            self.scheduler.check()
            return plan if plan.items else done
        return plan

    def run(self, limit: int = 10_000) -> None:
        """Until nothing is left; fails if that takes more than `limit` steps."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            assert self.step().items, "work is left, but nothing is planned"
        raise AssertionError("requests starve")

    @staticmethod
    def next_token(tokens: list[int]) -> int:
        """A deterministic stand-in for a model."""
        return (sum(tokens) * 31 + len(tokens) * 7) % 97

    def _play(self, plan: Plan, failing: frozenset[str]) -> StepResult:
        """Do to blocks what a device would do, and check that what an item reads is really there."""
        for name in plan.released:
            del self.rows[name], self.tables[name]
        for admission in plan.admitted:
            assert admission.request not in self.rows, "admitted twice"
            self.admissions[admission.request] = admission
            self.rows[admission.request] = [*admission.prompt.token_ids, *admission.generated]
            self.tables[admission.request] = []
        size = self.scheduler.pool.block_size
        assert len(dict(plan.swap_out).values()) == len({target for _, target in plan.swap_out})
        for source, target in plan.swap_out:
            assert 0 <= target < self.scheduler.swaps.num_blocks
            self.host[target] = self.computed.get(source, ())
        for source, target in plan.swap_in:
            self.computed[target] = self.host[source]
        for item in plan.items:
            self.tables[item.request].extend(item.blocks)
        for item in plan.items:  # all writes …
            row, table = self._row(item), self.tables[item.request]
            for position in range(item.start, item.start + item.tokens):
                block = table[position // size]
                kept = self.computed.get(block, ())[: position % size]
                kept += (-1,) * (position % size - len(kept))
                sound = item.request not in failing and self._is_sound(row, table, position)
                self.computed[block] = (*kept, row[position] if sound else -1)
        # … before any read
        return StepResult(plan.step, 0.5, tuple(self._answer(item, failing) for item in plan.items))

    def _is_sound(self, row: list[int], table: list[int], end: int) -> bool:
        """Whether the keys and values of [0, end) are there, and this request's."""
        size = self.scheduler.pool.block_size
        for position in range(end):
            held = self.computed.get(table[position // size], ())
            if position % size >= len(held) or held[position % size] == -1:
                return False
            assert held[position % size] == row[position], "reads another request's keys and values"
        return True

    def _row(self, item: PlanItem) -> list[int]:
        """Its tokens, as far as this item goes."""
        known = self.rows[item.request][: item.start + item.tokens - len(item.drafts)]
        assert len(known) + len(item.drafts) == item.start + item.tokens, "a position was skipped"
        return [*known, *item.drafts]

    def _answer(self, item: PlanItem, failing: frozenset[str]) -> Outcome:
        if item.request in failing:
            self.rows[item.request] += [-7] * item.samples
            return Outcome(failure=Failure("planned failure"))
        row = self._row(item)
        if not self._is_sound(row, self.tables[item.request], item.start + item.tokens):
            # what a device would compute from worthless keys and values: nobody may ever see it
            self.rows[item.request] += [-7] * item.samples
            return Outcome((-7,) * item.samples, pooled=Vectors.of((-7.0,)) if item.pools else None)
        if item.pools:
            return Outcome(pooled=Vectors.of((float(sum(row)),)))
        about_prompt = self._about_prompt(item)
        if not item.samples:
            return Outcome(prompt_logprobs=about_prompt)
        known = row[: len(row) - len(item.drafts)]
        made: list[int] = []
        for place in range(item.samples):
            made.append(self.next_token([*known, *made]))
            if place < len(item.drafts) and item.drafts[place] != made[-1]:
                break
        self.rows[item.request] = [*known, *made]
        return Outcome(tuple(made), prompt_logprobs=about_prompt)

    def _about_prompt(self, item: PlanItem) -> tuple[TokenLogprob, ...]:
        """Of the prompt's tokens behind each position, for those who ask; as executors, none of those whose
        prompt was told before a preemption."""
        admission = self.admissions[item.request]
        if admission.generated or admission.spec.prompt_logprobs_of(admission.index) is None:
            return ()
        ids = admission.prompt.token_ids
        return tuple(
            TokenLogprob(token, 0.0, 1) for token in ids[item.start + 1 : item.start + item.tokens + 1]
        )


def correct_drafts(one: Request, most: int) -> list[int]:
    """What the world's model will say, twice out of three times."""
    made: list[int] = []
    for _ in range(min(most, 3)):
        token = World.next_token([*one.tokens, *made])
        made.append(token if len(one.tokens) % 3 else token + 1)
    return made
