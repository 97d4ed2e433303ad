"""What every executor shares: who has failed stays failed; and the executor without a device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from penstock.core.cost import Coefficients, StepCost
from penstock.core.executor import Capacity, Failures, Items, Ticket
from penstock.core.plan import Admission, Failure, Outcome, Plan, PlanItem, TokenLogprob
from penstock.core.pooling import Vectors
from penstock.core.request_spec import Pooling, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.simulated import FEATURES, SimulatedExecutor, echo

from .world import request

BROKEN = Outcome(failure=Failure("broken"))


def items(*names: str) -> Items:
    return tuple(PlanItem(name, 0, 0, 1, samples=1) for name in names)


class Device:
    """Answers with each request's first letter; those in `broken` fail."""

    def __init__(self, *broken: str, regular: bool = True) -> None:
        self.broken, self.regular = set(broken), regular
        self.computed: list[str] = []

    def __call__(self, given: Items) -> tuple[Sequence[Outcome], bool]:
        assert given
        self.computed = [item.request for item in given]
        made = [BROKEN if name in self.broken else Outcome((ord(name),)) for name in self.computed]
        return made, self.regular


def test_whoever_has_failed_is_not_computed_any_more_and_fails_again() -> None:
    failures = Failures()
    assert failures.run(items("a", "b", "c"), Device("b")) == ((Outcome((97,)), BROKEN, Outcome((99,))), True)
    device = Device()
    assert failures.run(items("c", "b", "a"), device) == ((Outcome((99,)), BROKEN, Outcome((97,))), True)
    assert device.computed == ["c", "a"]


def test_whoever_is_let_go_may_come_back() -> None:
    failures = Failures()
    failures.run(items("a"), Device("a"))
    failures.forget("a")
    failures.forget("nobody")
    assert failures.run(items("a"), Device()) == ((Outcome((97,)),), True)


def test_nothing_is_computed_where_all_have_failed() -> None:
    failures, device = Failures(), Device("a")
    failures.run(items("a"), device)
    device.computed = []
    assert failures.run(items("a"), device) == ((BROKEN,), True)
    assert not device.computed


def test_a_step_that_was_repeated_is_told_so() -> None:
    failures = Failures()
    assert failures.run(items("a", "b"), Device("a", regular=False))[1] is False
    assert failures.run(items("a", "b"), Device(regular=False)) == ((BROKEN, Outcome((98,))), False)


PRIOR = Coefficients(fixed=1.0, per_token=0.5, per_context=0.25, per_sample=2.0)


def simulated(**options: object) -> SimulatedExecutor:
    return SimulatedExecutor(Capacity(16, 4, 100, PRIOR, FEATURES), echo, **options)  # type: ignore[arg-type]


def admit(spec: RequestSpec, *generated: int) -> tuple[Admission, ...]:
    return (Admission(spec.id, 0, spec, 0, generated),)


def test_the_simulated_device_takes_the_time_of_its_cost_model() -> None:
    executor = simulated()
    plan = Plan(0, admit(request("a", [1, 2, 3])), (PlanItem("a", 0, 0, 3, (0,), 1),))
    ticket = executor.submit(plan)
    assert ticket.step == 0
    result = executor.collect(ticket)
    assert (result.step, result.regular) == (0, True)
    assert result.seconds == pytest.approx(1.0 + 0.5 * 3 + 0.25 * 6 + 2.0)
    dearer = simulated(cost=StepCost(Coefficients(10.0, 0.0, 0.0, 0.0)))
    assert dearer.collect(dearer.submit(plan)).seconds == pytest.approx(10.0)
    assert executor.capacity() == Capacity(16, 4, 100, PRIOR, FEATURES)
    assert {"pooling", "adapter", "grammar", "inputs"} == FEATURES


def test_the_echo_begins_again_at_its_end() -> None:
    assert [echo("a", [4, 5, 6, *[0] * count], count) for count in range(5)] == [4, 5, 6, 4, 5]


def test_the_simulated_device_goes_on_where_it_was() -> None:
    executor = simulated()
    spec = request("a", [4, 5, 6])
    chunks = [
        PlanItem("a", 0, 0, 2, (0,), 0),
        PlanItem("a", 0, 2, 1, (), 1),
        PlanItem("a", 0, 3, 1, (), 1),
        PlanItem("a", 0, 4, 1, (1,), 1),
    ]
    made = []
    for step, item in enumerate(chunks):
        plan = Plan(step, admit(spec) if step == 0 else (), (item,))
        (outcome,) = executor.collect(executor.submit(plan)).outcomes
        made.append(outcome.tokens)
    assert made == [(), (4,), (5,), (6,)]


def test_a_request_comes_back_with_what_it_had_generated() -> None:
    executor = simulated()
    spec = request("a", [4, 5, 6], sampling=Sampling(prompt_logprobs=0))
    plan = Plan(0, admit(spec, 4, 5), (PlanItem("a", 0, 0, 5, (0, 1), 1),))
    (outcome,) = executor.collect(executor.submit(plan)).outcomes
    assert outcome == Outcome((6,))  # and its prompt was told before


def test_simulated_logprobs_are_certain() -> None:
    executor = simulated()
    spec = request("a", [4, 5, 6], sampling=Sampling(logprobs=2, prompt_logprobs=0))
    parts = [PlanItem("a", 0, 0, 2, (0,), 0), PlanItem("a", 0, 2, 1, (), 1)]
    told = []
    for step, item in enumerate(parts):
        plan = Plan(step, admit(spec) if step == 0 else (), (item,))
        told += executor.collect(executor.submit(plan)).outcomes
    assert told == [
        Outcome(prompt_logprobs=(TokenLogprob(5, 0.0, 1), TokenLogprob(6, 0.0, 1))),
        Outcome((4,), (TokenLogprob(4, 0.0, 1, ((4, 0.0),)),)),
    ]


def test_the_simulated_device_verifies_drafts() -> None:
    """The echo of [4, 5, 6] is 4, 5, 6, 4 …: of the guesses 5, 9 the first is right."""
    executor = simulated()
    executor.submit(Plan(0, admit(request("a", [4, 5, 6])), (PlanItem("a", 0, 0, 3, (0,), 1),)))
    wrong = PlanItem("a", 0, 3, 3, (1,), 3, (9, 5))
    with pytest.raises(ValueError, match="not known"):
        executor.submit(Plan(1, (), (wrong._replace(start=4, tokens=3),)))
    item = PlanItem("a", 0, 3, 3, (), 3, (5, 9))
    (outcome,) = executor.collect(executor.submit(Plan(1, (), (item,)))).outcomes
    assert outcome.tokens == (5, 6)
    item = PlanItem("a", 0, 5, 2, (), 2, (4,))
    (outcome,) = executor.collect(executor.submit(Plan(2, (), (item,)))).outcomes
    assert outcome.tokens == (4, 5)


def test_a_chunk_of_what_is_pooled_says_nothing() -> None:
    executor = simulated()
    spec = request("a", [4, 5, 6], pooling=Pooling())
    plan = Plan(0, admit(spec), (PlanItem("a", 0, 0, 2, (0,)),))
    assert executor.collect(executor.submit(plan)).outcomes == (Outcome(),)


def test_a_prompts_logprobs_end_with_the_prompt() -> None:
    executor = simulated()
    spec = request("a", [4, 5, 6, 7], sampling=Sampling(prompt_logprobs=0))
    parts = [PlanItem("a", 0, 0, 1, (0,)), PlanItem("a", 0, 1, 1), PlanItem("a", 0, 2, 2, (), 1)]
    told = []
    for step, item in enumerate([*parts, PlanItem("a", 0, 4, 1, (1,), 1)]):
        plan = Plan(step, admit(spec) if step == 0 else (), (item,))
        (outcome,) = executor.collect(executor.submit(plan)).outcomes
        told.append([each.token for each in outcome.prompt_logprobs])
    assert told == [[5], [6], [7], []]


def test_who_has_failed_may_come_back_to_the_simulated_device() -> None:
    executor = simulated()
    spec, item = request("a", [4]), PlanItem("a", 0, 0, 1, (0,), 1)
    executor._failures._outcomes["a"] = BROKEN
    again = Plan(0, admit(spec), (item,), released=("a",))
    assert executor.collect(executor.submit(again)).outcomes == (Outcome((4,)),)


def test_the_simulated_device_pools() -> None:
    executor = simulated()
    spec = request("a", [4, 5, 6], pooling=Pooling())
    plan = Plan(0, admit(spec), (PlanItem("a", 0, 0, 3, (0,), 0, (), True),))
    assert executor.collect(executor.submit(plan)).outcomes == (Outcome(pooled=Vectors.of((1.0,))),)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (PlanItem("a", 0, 0, 3, (0,), 1), ""),
        (PlanItem("a", 0, 0, 3, (), 1), "has 0 blocks of 4 tokens"),
        (PlanItem("a", 0, 2, 3, (0,), 1), "has 1 blocks of 4 tokens"),
        (PlanItem("a", 1, 0, 3, (0,), 1), "has 1 blocks"),
        (PlanItem("a", 0, 0, 4, (0,), 1), "reads tokens that are not known"),
    ],
)
def test_a_plan_that_makes_no_sense_breaks_the_simulated_device_too(item: PlanItem, said: str) -> None:
    executor = simulated()
    plan = Plan(0, admit(request("a", [4, 5, 6])), (item,))
    if said:
        with pytest.raises(ValueError, match=said):
            executor.submit(plan)
    else:
        executor.submit(plan)


def test_what_is_released_is_forgotten() -> None:
    executor = simulated()
    spec, item = request("a", [4]), PlanItem("a", 0, 0, 1, (0,), 1)
    executor.submit(Plan(0, admit(spec), (item,)))
    executor.submit(Plan(1, admit(spec), (item,), released=("a", "nobody")))
    with pytest.raises(KeyError):
        executor.submit(Plan(2, (), (item,), released=("a",)))
    executor.submit(Plan(3, admit(spec), (item,)))
    executor.close()
    executor.close()
    with pytest.raises(KeyError):
        executor.submit(Plan(4, (), (item._replace(start=1),)))
    with pytest.raises(TypeError, match="not from this executor"):
        executor.collect(Ticket(0))
