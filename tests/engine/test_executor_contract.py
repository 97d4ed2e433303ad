"""One contract, all executors: fake, simulated, torch on CPU, torch on a device that computes by itself
(played on the CPU), torch on CUDA where there is one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients
from penstock.core.executor import Capacity, Executor, Items, Ticket
from penstock.core.plan import Admission, Event, Failure, Outcome, Plan, PlanItem
from penstock.core.request import Request
from penstock.core.request_spec import FinishReason, Pooling, Prompt, RequestSpec
from penstock.core.scheduler import Drafter, Scheduler, SchedulerConfig
from penstock.core.simulated import FEATURES, SimulatedExecutor, echo
from penstock.engine.executor.ahead import Queued
from penstock.engine.executor.kept import Kept
from penstock.engine.executor.torch_executor import TorchExecutor
from tests.engine.build import torch_executor
from tests.engine.fake import FakeExecutor, spec
from tests.engine.streams import DelayedStream

Make = Callable[[], Executor]


def new_executor(kind: str, num_blocks: int = 32, host_blocks: int = 16) -> Executor:
    if kind == "fake":
        return FakeExecutor(num_blocks=num_blocks, block_size=4, host_blocks=host_blocks)
    if kind == "simulated":
        capacity = Capacity(num_blocks, 4, 256, Coefficients(), FEATURES, host_blocks)
        return SimulatedExecutor(capacity, echo)
    stream = DelayedStream() if kind == "ahead" else None
    device = "cpu" if kind == "ahead" else kind
    return torch_executor(num_blocks, 4, device, stream=stream, host_blocks=host_blocks)


@pytest.fixture(params=["fake", "simulated", "cpu", "ahead", "cuda"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """A function that makes a new executor of one kind."""
    made: list[Executor] = []
    kind: str = request.param
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def new() -> Executor:
        made.append(new_executor(kind))
        return made[-1]

    yield new
    for executor in made:
        executor.close()


def admission(
    name: str, tokens: tuple[int, ...], generated: tuple[int, ...] = (), epoch: int = 0, **sampling: object
) -> Admission:
    wanted = spec(name, tokens, 8, temperature=0.0, **sampling)  # type: ignore[arg-type]
    return Admission(name, epoch, wanted, 0, generated)


def item(
    name: str, start: int, tokens: int, blocks: tuple[int, ...], samples: int, epoch: int = 0
) -> PlanItem:
    return PlanItem(name, epoch, start, tokens, blocks, samples)


def check(plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Every item has an outcome of its kind, in its place."""
    assert len(outcomes) == len(plan.items)
    for each, outcome in zip(plan.items, outcomes, strict=True):
        assert outcome.failure is None
        assert (1 if each.samples else 0) <= len(outcome.tokens) <= each.samples
        assert (outcome.pooled is not None) == each.pools


def outcomes(executor: Executor, plan: Plan) -> dict[str, Outcome]:
    """What each request got."""
    return collect(executor, plan, executor.submit(plan))


def collect(executor: Executor, plan: Plan, ticket: Ticket) -> dict[str, Outcome]:
    result = executor.collect(ticket)
    assert result.step == plan.step == ticket.step
    assert result.seconds >= 0.0
    check(plan, result.outcomes)
    return {each.request: outcome for each, outcome in zip(plan.items, result.outcomes, strict=True)}


def run(executor: Executor, plan: Plan) -> dict[str, int]:
    """The token of each request that was sampled."""
    return {name: outcome.tokens[0] for name, outcome in outcomes(executor, plan).items() if outcome.tokens}


def decode(
    executor: Executor, prompt: tuple[int, ...], count: int, blocks: tuple[int, ...] = (5, 2, 7)
) -> list[int]:
    """Greedy tokens of a prompt, computed at once and then one by one."""
    first = Plan(0, (admission("a", prompt),), (item("a", 0, len(prompt), blocks, 1),))
    tokens = [run(executor, first)["a"]]
    for step in range(1, count):
        tokens.append(run(executor, Plan(step, items=(item("a", len(prompt) + step - 1, 1, (), 1),)))["a"])
    return tokens


PROMPT = (3, 14, 15, 92, 65, 35)


def test_capacity_is_what_was_asked_for(make: Make) -> None:
    capacity = make().capacity()
    assert (capacity.num_blocks, capacity.block_size) == (32, 4)
    assert capacity.vocab_size > 0
    assert all(value >= 0 for value in capacity.prior.as_tuple())
    assert capacity.features <= {"pooling", "adapter", "grammar", "inputs"}


def test_a_prompt_in_chunks_gives_the_same_tokens(make: Make) -> None:
    whole = decode(make(), PROMPT, 4)
    executor = make()
    run(executor, Plan(0, (admission("a", PROMPT),), (item("a", 0, 1, (5, 2, 7), 0),)))
    run(executor, Plan(1, items=(item("a", 1, 3, (), 0),)))
    tokens = [run(executor, Plan(2, items=(item("a", 4, 2, (), 1),)))["a"]]
    for step in range(3, 6):
        tokens.append(run(executor, Plan(step, items=(item("a", len(PROMPT) + step - 3, 1, (), 1),)))["a"])
    assert tokens == whole


def test_company_changes_nothing(make: Make) -> None:
    alone = decode(make(), PROMPT, 3)
    executor = make()
    together = run(
        executor,
        Plan(
            0,
            (admission("b", (1, 2, 3, 4, 5)), admission("a", PROMPT)),
            (item("b", 0, 5, (0, 1, 3), 1), item("a", 0, 6, (5, 2, 7), 1)),
        ),
    )
    tokens = [together["a"]]
    for step in (1, 2):
        items = (item("a", 5 + step, 1, (), 1), item("b", 4 + step, 1, (), 1))
        tokens.append(run(executor, Plan(step, items=items))["a"])
    assert tokens == alone


def test_blocks_filled_in_the_same_step_can_be_shared(make: Make) -> None:
    executor = make()
    tokens = run(
        executor,
        Plan(
            0,
            (admission("a", PROMPT), admission("b", PROMPT)),
            (item("a", 0, 6, (5, 2), 1), item("b", 4, 2, (5, 9), 1)),
        ),
    )
    assert tokens["a"] == tokens["b"] == decode(make(), PROMPT, 1)[0]


def test_a_released_request_may_come_back_with_what_it_generated(make: Make) -> None:
    whole = decode(make(), PROMPT, 4)
    executor = make()
    tokens = decode(executor, PROMPT, 2)
    again = Plan(
        2,
        (admission("a", PROMPT, tuple(tokens), epoch=1),),
        (item("a", 0, 8, (1, 30, 31), 1, epoch=1),),
        released=("a",),
    )
    tokens.append(run(executor, again)["a"])
    tokens.append(run(executor, Plan(3, items=(item("a", 8, 1, (), 1, epoch=1),)))["a"])
    assert tokens == whole


def test_two_steps_may_be_in_flight(make: Make) -> None:
    """The second one decodes what the first one samples, before anybody has seen it."""
    whole = decode(make(), PROMPT, 4)
    executor = make()
    plans = [
        Plan(0, (admission("a", PROMPT),), (item("a", 0, 6, (5, 2, 7), 1),)),
        *(Plan(step, items=(item("a", 5 + step, 1, (), 1),)) for step in (1, 2, 3)),
    ]
    flights: deque[tuple[Plan, Ticket]] = deque()
    tokens = []
    for plan in plans:
        flights.append((plan, executor.submit(plan)))
        if len(flights) == 2:
            tokens.append(collect(executor, *flights.popleft())["a"].tokens[0])
    tokens.append(collect(executor, *flights.popleft())["a"].tokens[0])
    assert tokens == whole


def test_what_a_plan_changes_harms_none_that_was_submitted_before_it(make: Make) -> None:
    """The second plan lets one request go, takes it in anew, and gives its blocks to another."""
    executor = make()
    others = (8, 9, 10)
    first = Plan(
        0,
        (admission("a", PROMPT), admission("b", others)),
        (item("a", 0, 6, (5, 2), 1), item("b", 0, 3, (0,), 1)),
    )
    second = Plan(
        1,
        (admission("a", PROMPT, epoch=2), admission("c", PROMPT, epoch=3)),
        (item("a", 0, 6, (5, 2), 1, epoch=2), item("c", 0, 6, (0, 1), 1, epoch=3)),
        released=("a", "b"),
    )
    tickets = [executor.submit(first), executor.submit(second)]
    made = [collect(executor, plan, ticket) for plan, ticket in zip((first, second), tickets, strict=True)]
    (expected,) = decode(make(), PROMPT, 1)
    assert made[0]["a"].tokens == made[1]["a"].tokens == made[1]["c"].tokens == (expected,)
    assert made[0]["b"].tokens[0] == decode(make(), others, 1)[0]


def test_drafts_are_verified(make: Make) -> None:
    """Tokens up to the first wrong one come out, and what stands behind it is as if it had never been."""
    whole = decode(make(), PROMPT, 6)
    for right in range(3):
        executor = make()
        begin = Plan(0, (admission("a", PROMPT),), (item("a", 0, 6, (5, 2, 7, 8), 1),))
        assert run(executor, begin)["a"] == whole[0]
        drafts = (*whole[1 : 1 + right], *[(token + 1) % 200 for token in whole[1 + right : 3]])
        guess = PlanItem("a", 0, 6, 3, (), 3, drafts)
        got = outcomes(executor, Plan(1, items=(guess,)))["a"].tokens
        assert list(got) == whole[1 : 2 + right]
        tokens = [whole[0], *got]
        while len(tokens) < 6:
            step = len(tokens)
            tokens.append(run(executor, Plan(1 + step, items=(item("a", 5 + step, 1, (), 1),)))["a"])
        assert tokens == whole


def pooling(name: str, tokens: tuple[int, ...], epoch: int = 0) -> Admission:
    wanted = RequestSpec(id=name, prompts=(Prompt(tokens, 0),), pooling=Pooling())
    return Admission(name, epoch, wanted, 0)


def test_a_prompt_is_pooled_whatever_its_chunks_and_company(make: Make) -> None:
    vectors = []
    for chunks, company in (((6,), False), ((2, 4), True)):
        executor, start = make(), 0
        admitted = (pooling("a", PROMPT), *((admission("b", (9, 8)),) if company else ()))
        for step, count in enumerate(chunks):
            ends = start + count == len(PROMPT)
            part = PlanItem("a", 0, start, count, (5, 2) if start == 0 else (), pools=ends)
            rest = (item("b", 0, 2, (0,), 1),) if company and step == 0 else ()
            got = outcomes(executor, Plan(step, admitted if step == 0 else (), (part, *rest)))
            start += count
        pooled = got["a"].pooled
        assert pooled is not None
        vector = pooled.row
        assert math.sqrt(sum(value * value for value in vector)) == pytest.approx(1.0, abs=1e-5)
        vectors.append(vector)
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5)


def test_logprobs_come_for_those_who_ask(make: Make) -> None:
    executor = make()
    got = outcomes(
        executor,
        Plan(
            0,
            (
                admission("a", PROMPT, logprobs=1),
                admission("b", PROMPT),
                admission("c", PROMPT, prompt_logprobs=0),
            ),
            (item("a", 0, 6, (5, 2), 1), item("b", 0, 6, (0, 1), 1), item("c", 0, 4, (3, 4), 0)),
        ),
    )
    assert [name for name, outcome in got.items() if outcome.logprobs] == ["a"]
    (entry,) = got["a"].logprobs
    assert (entry.token, entry.rank) == (got["a"].tokens[0], 1)
    assert [entry.token for entry in got["c"].prompt_logprobs] == list(PROMPT[1:5])
    rest = outcomes(executor, Plan(1, items=(item("c", 4, 2, (), 1),)))
    assert [entry.token for entry in rest["c"].prompt_logprobs] == [PROMPT[5]]


@pytest.mark.parametrize("wanted", [0, 2])
def test_prompts_come_with_as_many_alternatives_as_asked_for(wanted: int) -> None:
    plan = Plan(0, (admission("a", PROMPT, prompt_logprobs=wanted),), (item("a", 0, 6, (5, 2), 1),))
    entries = outcomes(torch_executor(), plan)["a"].prompt_logprobs
    assert [len(entry.top) for entry in entries] == [wanted] * (len(PROMPT) - 1)


def test_each_gets_its_own_rows_of_a_mixed_step(make: Make) -> None:
    """Prompts with and without logprobs, ends of prompts, a chunk, a decode: tokens and values as alone."""
    prompts = {"a": PROMPT, "b": (8, 9, 10), "c": (7, 6, 5, 4, 3), "d": (20, 21, 22, 23)}
    asks: dict[str, dict[str, object]] = {
        "a": {"prompt_logprobs": 2},
        "d": {"prompt_logprobs": 0, "logprobs": 2},
    }
    blocks = {"a": (5, 2), "b": (0,), "c": (3, 4), "d": (6,)}

    def parts(name: str, *chunks: int) -> list[PlanItem]:
        items, start = [], 0
        for tokens in chunks:
            own = blocks[name] if start == 0 else ()
            items.append(item(name, start, tokens, own, int(start + tokens == len(prompts[name]))))
            start += tokens
        return items

    def admitted(name: str) -> Admission:
        return admission(name, prompts[name], **asks.get(name, {}))  # type: ignore[arg-type]

    alone = {
        name: outcomes(make(), Plan(0, (admitted(name),), tuple(parts(name, len(prompt)))))[name]
        for name, prompt in prompts.items()
    }
    executor = make()
    # b begins alone, so that it decodes beside the rest
    begin = Plan(0, (admitted("b"),), tuple(parts("b", 3)))
    assert outcomes(executor, begin)["b"].tokens == alone["b"].tokens
    c, rest_of_c = parts("c", 3, 2)
    items = (*parts("a", 6), item("b", 3, 1, (), 1), c, *parts("d", 4))
    mixed = outcomes(executor, Plan(1, tuple(admitted(name) for name in "acd"), items))
    last = outcomes(executor, Plan(2, items=(rest_of_c,)))
    assert list(mixed["b"].tokens) == decode(make(), prompts["b"], 2, blocks=(1,))[1:]
    assert last["c"].tokens == alone["c"].tokens
    for name in "ad":
        assert mixed[name].tokens == alone[name].tokens
        got, want = mixed[name].prompt_logprobs, alone[name].prompt_logprobs
        assert [entry.token for entry in got] == list(prompts[name][1:])
        assert [entry.logprob for entry in got] == pytest.approx([entry.logprob for entry in want], abs=1e-4)
        assert [entry.rank for entry in got] == [entry.rank for entry in want]
    ((got_d,), (want_d,)) = mixed["d"].logprobs, alone["d"].logprobs
    assert got_d.logprob == pytest.approx(want_d.logprob, abs=1e-4)
    assert [name for name, outcome in mixed.items() if outcome.prompt_logprobs] == ["a", "d"]


def test_close_may_be_called_twice(make: Make) -> None:
    executor = make()
    executor.close()
    executor.close()


def test_layers_of_the_checkpoint_are_real() -> None:
    """Guards the fixture: a torch executor that ignored its input would pass much of the above."""
    executor = torch_executor(num_blocks=32, block_size=4, device="cpu")
    assert len({tuple(decode(torch_executor(32, 4, "cpu"), (n, 5, 9), 4)) for n in range(1, 9)}) > 4
    executor.close()


# ---------------------------------------------------------------------------- driven by a scheduler


def tight(caching: bool) -> SchedulerConfig:
    """Forces preemptions and chunks."""
    return SchedulerConfig(
        max_num_seqs=3,
        max_num_batched_tokens=5,
        max_model_len=24,
        watermark=0.0,
        enable_prefix_caching=caching,
    )


def drive(
    executor: Executor,
    specs: Sequence[RequestSpec],
    depth: int,
    num_blocks: int = 6,
    aborts: Sequence[tuple[int, str]] = (),
    drafter: Drafter | None = None,
    host_blocks: int = 0,
    caching: bool = True,
) -> tuple[dict[str, list[int]], dict[str, Event], Scheduler]:
    """(tokens, last event of each request, scheduler) with so many steps in flight; `aborts` are (number of
    commits before it, id)."""
    scheduler = Scheduler(
        tight(caching),
        BlockPool(num_blocks, 4),
        drafter=drafter,
        features=FEATURES,
        host_blocks=host_blocks,
    )
    for each in specs:
        scheduler.add(each, 0.0)
    tokens: dict[str, list[int]] = {name: [] for each in specs for name in each.ids}
    ends: dict[str, Event] = {}
    flights: deque[tuple[Plan, Ticket]] = deque()
    commits = 0

    def take(events: Sequence[Event]) -> None:
        for event in events:
            assert event.request not in ends, "told something after its end"
            tokens[event.request] += event.tokens
            if event.finish is not None:
                ends[event.request] = event

    while scheduler.has_work:
        while len(flights) < depth and (plan := scheduler.schedule(0.0)).items:
            flights.append((plan, executor.submit(plan)))
        plan, ticket = flights.popleft()
        for when, name in aborts:
            if when == commits and (event := scheduler.abort(name, 0.0)) is not None:
                take([event])
        take(scheduler.commit(plan, executor.collect(ticket), 0.0))
        scheduler.check()
        commits += 1
        assert commits < 1000, "somebody goes round in circles"
    assert not flights
    return tokens, ends, scheduler


PROMPTS = {"a": PROMPT, "b": (7, 7, 7), "c": (*PROMPT, 1, 2, 3), "d": PROMPT}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_scheduler_can_drive_it(make: Make, depth: int) -> None:
    """Random company, tiny budget, forced preemption: every request still gets what it gets alone."""
    alone = {name: decode(make(), prompt, 6, (3, 4, 5, 6)) for name, prompt in PROMPTS.items()}
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    tokens, ends, scheduler = drive(make(), specs, depth)
    assert {event.finish for event in ends.values()} == {FinishReason.LENGTH}
    assert scheduler.totals.preemptions > 0
    assert tokens == alone


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [True, False])
def test_what_was_preempted_comes_back_from_the_host(make: Make, depth: int, caching: bool) -> None:
    """Nothing is computed again where copies cost nothing, and no token is another one."""
    alone = {name: decode(make(), prompt, 6, (3, 4, 5, 6)) for name, prompt in PROMPTS.items()}
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    executor = make()
    room = executor.capacity().host_blocks
    tokens, _, scheduler = drive(executor, specs, depth, host_blocks=room, caching=caching)
    assert tokens == alone
    assert scheduler.totals.stored_blocks >= scheduler.totals.loaded_blocks > 0
    assert scheduler.totals.recomputed_tokens == 0
    assert scheduler.swaps.usage == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_random_choices_do_not_depend_on_steps_in_flight(make: Make, depth: int) -> None:
    specs = [spec(name, prompt, 6, seed=5, n=2) for name, prompt in PROMPTS.items()]
    assert drive(make(), specs, depth)[0] == drive(make(), specs, 1, num_blocks=30)[0]


def half_right(known: dict[str, list[int]]) -> Drafter:
    """Drafts of which every third is wrong."""

    def draft(request: Request, most: int) -> list[int]:
        done = len(request.tokens) - request.prompt_len
        return [
            token if (done + place) % 3 else (token + 1) % 200
            for place, token in enumerate(known[request.id][done : done + min(most, 3)])
        ]

    return draft


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 3, "frequency_penalty": 0.5}])
def test_drafts_change_no_token(make: Make, depth: int, sampling: dict[str, object]) -> None:
    specs = [spec(name, prompt, 8, **sampling) for name, prompt in PROMPTS.items()]  # type: ignore[arg-type]
    expected, _, _ = drive(make(), specs, 1)
    tokens, _, scheduler = drive(make(), specs, depth, drafter=half_right(expected))
    assert tokens == expected
    assert 0 < scheduler.totals.accepted_tokens < scheduler.totals.drafted_tokens


class _Failing:
    """Some calls of an executor's own computing raise: while certain requests are in them, once they are that
    far."""

    def __init__(self, executor: FakeExecutor | TorchExecutor, faults: dict[str, int]) -> None:
        self._compute = executor._compute
        self._faults = faults
        executor.recovery._compute = self
        if isinstance(executor, TorchExecutor):
            self._queue = executor._ahead.queue
            executor._ahead.queue = self.queue  # type: ignore[method-assign]

    def __call__(self, items: Items) -> Sequence[Outcome]:
        self._strike(items)
        return self._compute(items)

    def queue(self, items: Items, kept: list[Kept]) -> Queued:
        self._strike(items)
        return self._queue(items, kept)

    def _strike(self, items: Items) -> None:
        for each in items:
            if each.start + each.tokens >= self._faults.get(each.request, 1000):
                raise RuntimeError("planted")


faults = st.dictionaries(st.sampled_from(["a", "b:0", "b:1", "c", "d", "e"]), st.integers(1, 14), max_size=3)
aborts = st.lists(
    st.tuples(st.integers(0, 20), st.sampled_from(["a", "b:0", "b:1", "c", "d", "e"])), max_size=3
)


@pytest.mark.parametrize("kind", ["fake", "cpu", "ahead"])
@settings(max_examples=60, deadline=None)
@example(
    faults={"b:0": 4, "b:1": 2, "c": 2}, aborts=[], blocks=8, drafts=False, host=0
)  # once went round for ever
@given(
    faults=faults,
    aborts=aborts,
    blocks=st.integers(5, 9),
    drafts=st.booleans(),
    host=st.sampled_from([0, 3, 16]),
)
def test_steps_in_flight_change_no_answer(
    kind: str, faults: dict[str, int], aborts: list[tuple[int, str]], blocks: int, drafts: bool, host: int
) -> None:
    """Aborts, failures, preemptions, shared prompts: with one step in flight or two, whoever ends by himself
    gets the tokens that he gets without any of that, and nobody else more than a part of them."""
    specs = [
        spec("a", PROMPT, 6, temperature=0.0),
        spec("b", (*PROMPT[:5], 9), 5, temperature=0.8, seed=1, n=2),
        spec("c", (*PROMPT, 1, 2, 3), 6, temperature=0.0),
        spec("d", PROMPT, 6, temperature=0.0, logprobs=1),
        replace(spec("e", PROMPT, 1), sampling=None, pooling=Pooling(), prompts=(Prompt(PROMPT, 0),)),
    ]
    expected, clean, _ = drive(new_executor(kind), specs, 1, num_blocks=30)
    for depth in (1, 2):
        executor = new_executor(kind)
        assert isinstance(executor, FakeExecutor | TorchExecutor)
        _Failing(executor, faults)
        drafter = half_right(expected) if drafts else None
        tokens, ends, scheduler = drive(executor, specs, depth, blocks, aborts, drafter, host)
        assert set(ends) == set(expected)
        for name, end in ends.items():
            if end.finish in (FinishReason.LENGTH, FinishReason.STOP):
                assert tokens[name] == expected[name]
                if (vectors := clean[name].pooled) is not None:
                    assert end.pooled is not None
                    assert end.pooled.row == pytest.approx(vectors.row, abs=1e-4)
            else:
                assert tokens[name] == expected[name][: len(tokens[name])]
                assert end.finish is FinishReason.ABORT or end.failure == Failure("RuntimeError: planted")
        assert scheduler.pool.available == blocks
        executor.close()


def test_min_tokens_holds_the_end_back_although_it_is_ignored() -> None:
    """As in vLLM: the end-of-sequence token cannot be generated before min_tokens, whether it would end the
    output or not."""
    end, executor = 9, torch_executor(num_blocks=32, block_size=4, device="cpu")
    asked = {"logit_bias": {end: 100.0}, "min_tokens": 2}
    for ignoring in (False, True):
        first = admission("a", PROMPT, ignore_eos=ignoring, **asked)
        admitted = replace(first, spec=replace(first.spec, eos_ids=(end,)))
        tokens = [run(executor, Plan(0, (admitted,), (item("a", 0, len(PROMPT), (5, 2, 7), 1),)))["a"]]
        for step in (1, 2, 3):
            plan = Plan(step, items=(item("a", len(PROMPT) + step - 1, 1, (), 1),))
            tokens.append(run(executor, plan)["a"])
        assert [token == end for token in tokens] == [False, False, True, True]
        executor.close()
        executor = torch_executor(num_blocks=32, block_size=4, device="cpu")
    executor.close()


lost = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.9]),
        "seed": st.integers(0, 99),
        "frequency_penalty": st.sampled_from([0.0, 1.5]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "min_tokens": st.integers(0, 8),
        "logprobs": st.integers(0, 2),
    },
)


@pytest.mark.parametrize("kind", ["fake", "simulated", "cpu", "ahead"])
@settings(max_examples=40, deadline=None)
@given(sampling=lost, when=st.integers(1, 7), blocks=st.integers(5, 9), depth=st.integers(1, 2))
def test_a_request_goes_on_where_another_engine_was_lost(
    kind: str, sampling: dict[str, object], when: int, blocks: int, depth: int
) -> None:
    """With a seed or none drawn, penalties, a minimum: the rest is what the first engine would have said."""
    whole = spec("a", PROMPT, 8, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    whole = replace(whole, drawn_seed=5)
    others = [spec("b", (*PROMPT, 9), 8, temperature=0.8, seed=1)]
    first, _, _ = drive(new_executor(kind), [whole], 1, num_blocks=30)
    if len(first["a"]) <= when:
        return
    rest = replace(whole, prompts=(replace(whole.prompts[0], generated=tuple(first["a"][:when])),))
    again, ends, scheduler = drive(new_executor(kind), [*others, rest], depth, blocks)
    assert again["a"] == first["a"][when:]
    assert ends["a"].cached <= len(PROMPT)
    assert scheduler.pool.available == blocks
