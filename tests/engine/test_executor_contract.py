"""One contract, all executors: fake, simulated, torch on CPU, torch on CUDA where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients
from penstock.core.plan import Admission, Plan, PlanItem, StepResult
from penstock.core.request import FinishReason, Request
from penstock.core.sampling_params import SamplingParams
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.engine.executor.base import Capacity, Executor
from penstock.engine.executor.simulated import FakeExecutor, SimulatedExecutor, echo
from tests.engine.build import torch_executor

Make = Callable[[], Executor]


@pytest.fixture(params=["fake", "simulated", "cpu", "cuda"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """A function that makes a new executor of one kind."""
    made: list[Executor] = []
    kind: str = request.param
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def new() -> Executor:
        executor: Executor
        if kind == "fake":
            executor = FakeExecutor(num_blocks=32, block_size=4)
        elif kind == "simulated":
            executor = SimulatedExecutor(Capacity(32, 4, 256, Coefficients()), echo)
        else:
            executor = torch_executor(num_blocks=32, block_size=4, device=kind)
        made.append(executor)
        return executor

    yield new
    for executor in made:
        executor.close()


def admission(
    name: str, tokens: tuple[int, ...], prompt_len: int | None = None, **params: object
) -> Admission:
    return Admission(name, tokens, prompt_len or len(tokens), SamplingParams(temperature=0.0, **params))  # type: ignore[arg-type]


def run(executor: Executor, plan: Plan) -> dict[str, int]:
    result = executor.collect(executor.submit(plan))
    assert result.step == plan.step
    assert result.seconds >= 0.0
    assert not result.errors
    assert set(result.tokens) == {item.request for item in plan.items if item.sample}
    return dict(result.tokens)


def decode(
    executor: Executor, prompt: tuple[int, ...], count: int, blocks: tuple[int, ...] = (5, 2, 7)
) -> list[int]:
    """Greedy tokens of a prompt, computed at once and then one by one."""
    first = Plan(0, (admission("a", prompt),), (PlanItem("a", 0, len(prompt), blocks, True),))
    tokens = [run(executor, first)["a"]]
    for step in range(1, count):
        item = PlanItem("a", len(prompt) + step - 1, 1, (), True)
        tokens.append(run(executor, Plan(step, items=(item,)))["a"])
    return tokens


PROMPT = (3, 14, 15, 92, 65, 35)


def test_capacity_is_what_was_asked_for(make: Make) -> None:
    capacity = make().capacity()
    assert (capacity.num_blocks, capacity.block_size) == (32, 4)
    assert capacity.vocab_size > 0
    assert all(value >= 0 for value in capacity.prior.as_tuple())


def test_a_prompt_in_chunks_gives_the_same_tokens(make: Make) -> None:
    whole = decode(make(), PROMPT, 4)
    executor = make()
    run(executor, Plan(0, (admission("a", PROMPT),), (PlanItem("a", 0, 1, (5, 2, 7), False),)))
    run(executor, Plan(1, items=(PlanItem("a", 1, 3, (), False),)))
    tokens = [run(executor, Plan(2, items=(PlanItem("a", 4, 2, (), True),)))["a"]]
    for step in range(3, 6):
        item = PlanItem("a", len(PROMPT) + step - 3, 1, (), True)
        tokens.append(run(executor, Plan(step, items=(item,)))["a"])
    assert tokens == whole


def test_company_changes_nothing(make: Make) -> None:
    alone = decode(make(), PROMPT, 3)
    executor = make()
    other = (1, 2, 3, 4, 5)
    together = run(
        executor,
        Plan(
            0,
            (admission("b", other), admission("a", PROMPT)),
            (PlanItem("b", 0, 5, (0, 1, 3), True), PlanItem("a", 0, 6, (5, 2, 7), True)),
        ),
    )
    tokens = [together["a"]]
    for step in (1, 2):
        items = (PlanItem("a", 5 + step, 1, (), True), PlanItem("b", 4 + step, 1, (), True))
        tokens.append(run(executor, Plan(step, items=items))["a"])
    assert tokens == alone


def test_blocks_filled_in_the_same_step_can_be_shared(make: Make) -> None:
    executor = make()
    tokens = run(
        executor,
        Plan(
            0,
            (admission("a", PROMPT), admission("b", PROMPT)),
            (PlanItem("a", 0, 6, (5, 2), True), PlanItem("b", 4, 2, (5, 9), True)),
        ),
    )
    assert tokens["a"] == tokens["b"] == decode(make(), PROMPT, 1)[0]


def test_a_released_request_may_come_back_with_what_it_generated(make: Make) -> None:
    whole = decode(make(), PROMPT, 4)
    executor = make()
    tokens = decode(executor, PROMPT, 2)
    again = Plan(
        2,
        (admission("a", PROMPT + tuple(tokens), len(PROMPT)),),
        (PlanItem("a", 0, 8, (1, 30, 31), True),),
        released=("a",),
    )
    tokens.append(run(executor, again)["a"])
    tokens.append(run(executor, Plan(3, items=(PlanItem("a", 8, 1, (), True),)))["a"])
    assert tokens == whole


def test_a_part_of_the_last_plan_can_be_computed_again(make: Make) -> None:
    """This is how the loop finds the request that breaks a step."""
    executor = make()
    a, b = PlanItem("a", 0, 6, (5, 2, 7), True), PlanItem("b", 0, 2, (0,), True)
    executor.submit(Plan(0, (admission("a", PROMPT), admission("b", (8, 9))), (a, b)))
    tokens = run(executor, Plan(0, items=(a,))) | run(executor, Plan(0, items=(b,)))
    assert tokens["a"] == decode(make(), PROMPT, 1)[0]
    assert run(executor, Plan(1, items=(PlanItem("a", 6, 1, (), True), PlanItem("b", 2, 1, (), True))))


def test_logprobs_come_for_those_who_ask(make: Make) -> None:
    executor = make()
    plan = Plan(
        0,
        (
            admission("a", PROMPT, logprobs=1),
            admission("b", PROMPT),
            admission("c", PROMPT, prompt_logprobs=0),
        ),
        (
            PlanItem("a", 0, 6, (5, 2), True),
            PlanItem("b", 0, 6, (0, 1), True),
            PlanItem("c", 0, 4, (3, 4), False),
        ),
    )
    result = executor.collect(executor.submit(plan))
    assert set(result.logprobs) == {"a"}
    assert result.logprobs["a"].token == result.tokens["a"]
    assert result.logprobs["a"].rank == 1
    assert [entry.token for entry in result.prompt_logprobs["c"]] == list(PROMPT[1:5])
    rest = executor.collect(executor.submit(Plan(1, items=(PlanItem("c", 4, 2, (), True),))))
    assert [entry.token for entry in rest.prompt_logprobs["c"]] == [PROMPT[5]]


def test_each_gets_its_own_rows_of_a_mixed_step(make: Make) -> None:
    """Prompts with and without logprobs, ends of prompts, a chunk, a decode: tokens and values as alone."""
    prompts = {"a": PROMPT, "b": (8, 9, 10), "c": (7, 6, 5, 4, 3), "d": (20, 21, 22, 23)}
    asks: dict[str, dict[str, object]] = {
        "a": {"prompt_logprobs": 1},
        "d": {"prompt_logprobs": 0, "logprobs": 2},
    }
    blocks = {"a": (5, 2), "b": (0,), "c": (3, 4), "d": (6,)}

    def parts(name: str, *chunks: int) -> list[PlanItem]:
        items, start = [], 0
        for tokens in chunks:
            own = blocks[name] if start == 0 else ()
            items.append(PlanItem(name, start, tokens, own, start + tokens == len(prompts[name])))
            start += tokens
        return items

    def admitted(name: str) -> Admission:
        return admission(name, prompts[name], **asks.get(name, {}))

    alone: dict[str, StepResult] = {}
    for name, prompt in prompts.items():
        executor = make()
        plan = Plan(0, (admitted(name),), tuple(parts(name, len(prompt))))
        alone[name] = executor.collect(executor.submit(plan))
    executor = make()
    # b begins alone, so that it decodes beside the rest
    begin = Plan(0, (admitted("b"),), tuple(parts("b", 3)))
    assert run(executor, begin)["b"] == alone["b"].tokens["b"]
    c, rest_of_c = parts("c", 3, 2)
    items = (*parts("a", 6), PlanItem("b", 3, 1, (), True), c, *parts("d", 4))
    mixed = executor.collect(executor.submit(Plan(1, tuple(admitted(name) for name in "acd"), items)))
    last = executor.collect(executor.submit(Plan(2, items=(rest_of_c,))))
    assert mixed.tokens["b"] == decode(make(), prompts["b"], 2, blocks=(1,))[1]
    assert last.tokens == alone["c"].tokens
    for name in "ad":
        assert mixed.tokens[name] == alone[name].tokens[name]
        got, want = mixed.prompt_logprobs[name], alone[name].prompt_logprobs[name]
        assert [entry.token for entry in got] == list(prompts[name][1:])
        assert [entry.logprob for entry in got] == pytest.approx([entry.logprob for entry in want], abs=1e-4)
        assert [entry.rank for entry in got] == [entry.rank for entry in want]
    assert mixed.logprobs["d"].logprob == pytest.approx(alone["d"].logprobs["d"].logprob, abs=1e-4)
    assert set(mixed.prompt_logprobs) == {"a", "d"}


def test_a_scheduler_can_drive_it(make: Make) -> None:
    """Random company, tiny budget, forced preemption: every request still gets what it gets alone."""
    prompts = {"a": PROMPT, "b": (7, 7, 7), "c": (*PROMPT, 1, 2, 3), "d": PROMPT}
    alone = {name: decode(make(), prompt, 6, (3, 4, 5, 6)) for name, prompt in prompts.items()}
    executor = make()
    config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=5, max_model_len=24, watermark=0.0)
    scheduler = Scheduler(config, BlockPool(6, 4))
    for name, prompt in prompts.items():
        params = SamplingParams(temperature=0.0, max_tokens=6)
        scheduler.add(Request(id=name, prompt=prompt, params=params, max_tokens=6), 0.0)
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    finished = set()
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        for event in scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0):
            tokens[event.request] += event.tokens
            if event.finish is FinishReason.LENGTH:
                finished.add(event.request)
        scheduler.check()
    assert finished == set(prompts)
    assert scheduler.totals.preemptions > 0
    assert tokens == alone


def test_close_may_be_called_twice(make: Make) -> None:
    executor = make()
    executor.close()
    executor.close()


def test_layers_of_the_checkpoint_are_real(tmp_path: Path) -> None:
    """Guards the fixture: a torch executor that ignored its input would pass much of the above."""
    executor = torch_executor(num_blocks=32, block_size=4, device="cpu")
    assert len({tuple(decode(torch_executor(32, 4, "cpu"), (n, 5, 9), 4)) for n in range(1, 9)}) > 4
    executor.close()


def test_a_plan_in_parts_gives_the_same_tokens(make: Make) -> None:
    """This is how the engine computes a step that does not fit into memory; some parts are tried twice."""
    a, b = (
        PlanItem("a", 0, 6, (5, 2), True),
        PlanItem("b", 4, 3, (5, 9), True),
    )  # b reads a block that a fills
    both = (admission("a", PROMPT), admission("b", (*PROMPT[:4], 8, 9, 10)))
    more = (PlanItem("a", 6, 1, (), True), PlanItem("b", 7, 1, (), True))
    last = (PlanItem("a", 7, 1, (), True), PlanItem("b", 8, 1, (30,), True))
    executor = make()
    whole = [run(executor, Plan(0, both, (a, b))), run(executor, Plan(1, items=more))]
    whole.append(run(executor, Plan(2, items=last)))
    executor = make()
    head = PlanItem("a", 0, 4, (5, 2), False)
    tail, start = PlanItem("a", 4, 2, (5, 2), True), PlanItem("b", 4, 1, (5, 9), False)
    executor.submit(Plan(0, both, (head,)))  # as if it had not fitted
    assert run(executor, Plan(0, both, (head,))) == {}
    tokens = run(executor, Plan(0, both, (tail, start)))
    tokens |= run(executor, Plan(0, both, (PlanItem("b", 5, 2, (5, 9), True),)))
    assert tokens == whole[0]
    assert run(executor, Plan(1, items=more[:1])) | run(executor, Plan(1, items=more[1:])) == whole[1]
    assert run(executor, Plan(2, items=last)) == whole[2]
