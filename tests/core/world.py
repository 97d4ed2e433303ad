"""A scheduler in a world without devices: it draws tokens, checks every invariant, and keeps the plan log."""

from __future__ import annotations

from penstock.core.blocks import BlockPool
from penstock.core.plan import Event, Plan, StepResult
from penstock.core.request import Request
from penstock.core.sampling_params import SamplingParams
from penstock.core.scheduler import Scheduler, SchedulerConfig


def config(**changes: object) -> SchedulerConfig:
    """Small limits, so that every one of them is hit."""
    values: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        **changes,
    }
    return SchedulerConfig(**values)  # type: ignore[arg-type]


def request(name: str, prompt: list[int] | int, max_tokens: int = 8, **fields: object) -> Request:
    """A request; an int prompt means that many distinct tokens."""
    tokens = tuple(range(1000, 1000 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = fields.pop("params", None) or SamplingParams(max_tokens=max_tokens)
    return Request(id=name, prompt=tokens, params=params, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


class World:
    """Runs a scheduler; token t of a request is a function of its content only, as in a greedy model."""

    def __init__(self, settings: SchedulerConfig, num_blocks: int = 16, block_size: int = 4) -> None:
        self.scheduler = Scheduler(settings, BlockPool(num_blocks, block_size))
        self.now = 0.0
        self.log: list[str] = []
        self.events: list[Event] = []
        self.rows: dict[str, list[int]] = {}
        self.computed: dict[int, tuple[int, ...]] = {}
        """block id → the tokens whose keys and values it holds: what a device would have written."""

    def add(self, new: Request) -> None:
        self.scheduler.add(new, self.now)
        self.scheduler.check()

    def abort(self, name: str) -> None:
        event = self.scheduler.abort(name, self.now)
        if event is not None:
            self.events.append(event)
        self.scheduler.check()

    def step(self, failing: frozenset[str] = frozenset()) -> Plan:
        """One step; requests in `failing` fail in it, without having written anything."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check()
        self.events.extend(self.scheduler.take_events())
        if not plan.items:
            return plan
        self.log.append(plan.to_json())
        self._play(plan, failing)
        result = StepResult(
            step=plan.step,
            seconds=0.5,
            tokens={
                item.request: self.next_token(self.rows[item.request])
                for item in plan.items
                if item.sample and item.request not in failing
            },
            errors={item.request: "planned failure" for item in plan.items if item.request in failing},
        )
        for name, token in result.tokens.items():
            self.rows[name].append(token)
        self.events.extend(self.scheduler.commit(plan, result, self.now))
        self.scheduler.check()
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

    def _play(self, plan: Plan, failing: frozenset[str]) -> None:
        """Do to blocks what a device would do, and check that what an item reads is really there."""
        for name in plan.released:
            del self.rows[name]
            del self._tables[name]
        for admission in plan.admitted:
            assert admission.request not in self.rows, "admitted twice"
            self.rows[admission.request] = list(admission.tokens)
            self._tables[admission.request] = []
        size = self.scheduler.pool.block_size
        for item in plan.items:
            self._tables[item.request].extend(item.blocks)
        for item in plan.items:  # all writes …
            if item.request in failing:
                continue
            row, table = self.rows[item.request], self._tables[item.request]
            assert item.start + item.tokens <= len(row)
            for position in range(item.start, item.start + item.tokens):
                block = table[position // size]
                kept = self.computed.get(block, ())[: position % size]
                assert len(kept) == position % size, "a position was skipped"
                self.computed[block] = (*kept, row[position])
        for item in plan.items:  # … before any read
            if item.request in failing or failing:
                continue
            row, table = self.rows[item.request], self._tables[item.request]
            for position in range(item.start + item.tokens):
                held = self.computed[table[position // size]]
                assert held[position % size] == row[position], "reads another request's keys and values"

    @property
    def _tables(self) -> dict[str, list[int]]:
        if not hasattr(self, "_block_tables"):
            self._block_tables: dict[str, list[int]] = {}
        return self._block_tables
