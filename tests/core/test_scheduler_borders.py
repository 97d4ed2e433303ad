"""The scheduler at its borders: the last token of a budget, the last block, the last in a queue; its sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepCost
from penstock.core.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from penstock.core.plan import Event, Failure, Outcome, Plan, StepResult, TokenLogprob
from penstock.core.policy import Fcfs, View
from penstock.core.pooling import Vectors
from penstock.core.request import Request
from penstock.core.request_spec import FinishReason, Pooling
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.core.stats import EngineStats, Totals

from .world import World, config, correct_drafts, request, step_result


def shape(plan: Plan) -> dict[str, int]:
    return {item.request: item.tokens for item in plan.items}


# ---------------------------------------------------------------------------- what it is made of


def test_limits_unless_told() -> None:
    limits = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=2, max_model_len=3)
    assert (limits.enable_prefix_caching, limits.policy, limits.watermark) == (True, "fcfs", 0.01)
    assert (limits.long_prefill_token_threshold, limits.max_num_mixed_prefill_tokens) == (0, 0)
    assert (limits.max_num_queued_reqs, limits.max_num_queued_tokens) == (None, None)


def test_the_cost_model_is_the_one_that_was_given() -> None:
    cost = StepCost()
    assert Scheduler(config(), BlockPool(4, 4), cost).cost is cost
    assert Scheduler(config(), BlockPool(4, 4)).cost.prior == cost.prior


def test_steps_and_admissions_are_numbered_from_0() -> None:
    world = World(config(max_num_seqs=1))
    for name in "abc":
        world.add(request(name, [1], max_tokens=1))
    plans = [world.step() for _ in range(3)]
    assert [plan.step for plan in plans] == [0, 1, 2]
    assert [plan.admitted[0].epoch for plan in plans] == [0, 1, 2]
    assert world.scheduler.numbers == (3, 3)


def test_a_reset_goes_on_with_the_numbers_that_it_is_given() -> None:
    world = World(config())
    world.add(request("a", [1]))
    world.step()
    world.scheduler.reset()
    assert world.scheduler.numbers == (1, 1)
    world.scheduler.reset((7, 3))
    world.scheduler.add(request("b", [1]), 0.0)
    plan = world.scheduler.schedule(1.0)
    assert (plan.step, plan.admitted[0].epoch) == (7, 3)


# ---------------------------------------------------------------------------- what is refused


def test_what_the_device_cannot_do_is_refused_by_name() -> None:
    scheduler = Scheduler(config(), BlockPool(4, 4), features=("pooling",))
    with pytest.raises(UnsupportedParameter, match=r"request needs: adapter, grammar\.") as caught:
        scheduler.add(request("a", [1], adapter="lora", grammar="json"), 0.0)
    assert caught.value.param == "adapter"
    assert not scheduler.has_work
    scheduler.add(request("a", [1], pooling=Pooling()), 0.0)


def test_an_id_in_use_is_refused_by_name() -> None:
    world = World(config())
    world.add(request("a", [1]))
    with pytest.raises(InvalidRequest, match="'a' is already in use") as caught:
        world.add(request("a", [1]))
    assert caught.value.param == "request_id"


def test_a_request_may_fill_the_context_and_the_cache_but_no_more() -> None:
    world = World(config(max_model_len=20), num_blocks=9)
    world.add(request("a", 12, max_tokens=8))
    with pytest.raises(ContextLengthExceeded, match=r"\(13 tokens\) and max_tokens \(8\)") as caught:
        world.add(request("b", 13, max_tokens=8))
    assert (caught.value.param, caught.value.advice) == ("max_tokens", "")
    world = World(config(max_model_len=100), num_blocks=5)
    world.add(request("c", 12, max_tokens=8))
    with pytest.raises(ContextLengthExceeded, match="may grow to 21 tokens, but the whole KV") as caught:
        world.add(request("d", 13, max_tokens=8))
    assert caught.value.param == "max_tokens"
    assert caught.value.advice == "Ask for fewer tokens, or start the server with more KV cache."


def test_every_event_says_when() -> None:
    world = World(config(max_num_seqs=1, max_num_queued_reqs=0))
    world.add(request("pools", [1], pooling=Pooling()))
    world.add(request("over", [2]))
    world.step()
    world.now = 5.0
    world.add(request("leaves", [3]))
    world.abort("leaves")
    assert [(event.request, event.finish, event.at) for event in world.events] == [
        ("over", FinishReason.ERROR, 1.0),
        ("pools", FinishReason.STOP, 1.0),
        ("leaves", FinishReason.ABORT, 5.0),
    ]
    assert world.scheduler.take_events() == []


def test_a_failure_says_when() -> None:
    world = World(config())
    world.add(request("a", [1]))
    plan = world.scheduler.schedule(1.0)
    failed = StepResult(plan.step, 0.5, (Outcome(failure=Failure("broken")),))
    (event,) = world.scheduler.commit(plan, failed, 3.0)
    assert (event.finish, event.at, event.scheduled_at) == (FinishReason.ERROR, 3.0, 1.0)


# ---------------------------------------------------------------------------- the last of everything


def test_the_last_token_of_a_budget_is_used() -> None:
    world = World(config(max_num_batched_tokens=3), num_blocks=32)
    world.add(request("a", [1], max_tokens=9))
    world.add(request("b", [2], max_tokens=9))
    world.add(request("c", [3] * 5))
    assert shape(world.step()) == {"a": 1, "b": 1, "c": 1}
    assert shape(world.step()) == {"a": 1, "b": 1, "c": 1}


def test_a_prompt_for_which_nothing_is_left_is_not_in_the_plan() -> None:
    world = World(config(max_num_batched_tokens=3), num_blocks=32)
    world.add(request("a", [1], max_tokens=9))
    world.add(request("b", [2] * 9))
    world.add(request("c", [3]))
    assert shape(world.step()) == {"a": 1, "b": 2}
    world.scheduler.config = replace(world.scheduler.config, max_num_batched_tokens=1)
    assert shape(world.step()) == {"a": 1}


def test_a_threshold_of_one_token() -> None:
    world = World(config(long_prefill_token_threshold=1), num_blocks=32)
    world.add(request("a", 3))
    assert [shape(world.step()) for _ in range(4)] == [{"a": 1}] * 4
    assert world.scheduler.totals.prompt_tokens == 3


def test_a_prompt_that_is_pooled_may_end_in_a_chunk_of_one_token() -> None:
    world = World(config(), num_blocks=32)
    world.add(request("a", 17, pooling=Pooling()))
    assert [shape(world.step()), shape(world.step())] == [{"a": 16}, {"a": 1}]
    assert world.events[-1].pooled == Vectors.of((float(sum(range(1000, 1017))),))


def test_a_prompt_that_is_pooled_may_fill_the_cache() -> None:
    world = World(config(max_num_batched_tokens=19), num_blocks=5)
    world.add(request("a", 20, pooling=Pooling()))
    assert [shape(world.step()), shape(world.step())] == [{"a": 19}, {"a": 1}]
    assert (world.scheduler.totals.preemptions, world.scheduler.has_work) == (0, False)


@pytest.mark.parametrize(("length", "fits"), [(20, True), (21, False)])
def test_admission_leaves_the_watermark_to_those_who_run(length: int, fits: bool) -> None:
    """Of 10 blocks one has 3, and 2 are reserved: 5 are left, for 20 tokens."""
    world = World(config(watermark=0.2, max_num_batched_tokens=64), num_blocks=10)
    world.add(request("runs", 10, max_tokens=2))
    world.step()
    world.add(request("comes", [7] * length, max_tokens=2))
    assert shape(world.step()) == {"runs": 1, **({"comes": length} if fits else {})}
    world.run()


def test_where_nobody_runs_nothing_is_reserved() -> None:
    world = World(config(watermark=0.5, max_num_batched_tokens=64), num_blocks=4)
    world.add(request("a", 15, max_tokens=1))
    assert shape(world.step()) == {"a": 15}
    world.run()


def test_whoever_is_preempted_makes_room_for_nobody_new_in_that_step() -> None:
    world = World(config(watermark=0.0, enable_prefix_caching=False), num_blocks=4)
    world.add(request("old", [1] * 7, max_tokens=9))
    world.add(request("young", [5] * 7, max_tokens=8))
    world.step()
    world.add(request("tiny", [9], max_tokens=1))
    while not world.scheduler.totals.preemptions:
        plan = world.step()
    assert (shape(plan), plan.admitted, plan.released) == ({"old": 1}, (), ("young",))
    assert world.scheduler._roll.requests["young"].preemptions == 1
    world.run()
    ends = {event.request: event for event in world.events if event.finish}
    assert world.scheduler.totals.preemptions == sum(event.preemptions for event in ends.values())


def test_nobody_is_admitted_into_what_a_victim_has_given_back_in_that_step() -> None:
    """`first` goes before `young`, and would find room at once."""
    limits = config(policy="priority", watermark=0.0, max_num_seqs=2, enable_prefix_caching=False)
    world = World(limits, num_blocks=4)
    world.add(request("old", [1] * 7, max_tokens=9, priority=0))
    world.add(request("young", [5] * 7, max_tokens=8, priority=5))
    world.step()
    world.add(request("first", [9], max_tokens=1, priority=1))
    while not world.scheduler.totals.preemptions:
        plan = world.step()
    assert (shape(plan), plan.admitted) == ({"old": 1}, ())
    assert shape(world.step()) == {"old": 1, "first": 1}
    world.run()


def test_a_victim_whose_token_is_under_way_is_passed_over_and_all_behind_it_may_come() -> None:
    world = World(config(watermark=0.0, enable_prefix_caching=False), num_blocks=5, depth=3)
    world.add(request("old", [1], max_tokens=9))
    world.add(request("young", [5] * 6, max_tokens=8))
    while not world.scheduler.totals.preemptions:
        world.step()
    for name in ("next", "last"):
        world.add(request(name, [ord(name[0])], max_tokens=1))
    queue = world.scheduler._roll.queue
    plan = world.plan()
    assert queue[0].id == "young"
    assert queue[0].pending == 1
    assert shape(plan) == {"old": 1, "next": 1, "last": 1}


class FirstYields(Fcfs):
    """Whoever came first gives way."""

    def victim(self, running: Sequence[Request], view: View) -> Request:
        return running[0]


def test_a_victim_loses_the_place_in_the_plan_that_it_had_already() -> None:
    world = World(config(watermark=0.0, enable_prefix_caching=False), num_blocks=4, policy=FirstYields())
    world.add(request("a", [1] * 6, max_tokens=8))
    world.add(request("b", [5] * 7, max_tokens=8))
    plans = []
    while not world.scheduler.totals.preemptions:
        plans.append(shape(world.step()))
    assert plans[:2] == [{"a": 6, "b": 7}, {"a": 1, "b": 1}]
    assert plans[-1] == {"b": 1}
    world.run()
    ends = {event.request: event.finish for event in world.events if event.finish}
    assert ends == dict.fromkeys("ab", FinishReason.LENGTH)


def test_siblings_wait_for_every_chunk_of_the_prompt() -> None:
    world = World(config(max_num_batched_tokens=64, long_prefill_token_threshold=10), num_blocks=32)
    world.add(request("a", 30, n=2))
    plans = [shape(world.step()) for _ in range(3)]
    assert plans == [{"a:0": 10}, {"a:0": 10}, {"a:0": 10, "a:1": 2}]


def test_a_chunk_says_nothing_and_those_behind_it_are_heard() -> None:
    world = World(config(long_prefill_token_threshold=5), num_blocks=32)
    world.add(request("a", 12))
    world.add(request("b", [5, 6, 7]))
    assert shape(world.step()) == {"a": 5, "b": 3}
    assert [event.request for event in world.events] == ["b"]


def test_a_step_that_did_not_run_as_planned_teaches_nothing() -> None:
    world = World(config())
    world.add(request("a", [1]))
    plan = world.scheduler.schedule(1.0)
    world.scheduler.commit(plan, StepResult(plan.step, 0.5, (Outcome((5,)),), regular=False), 2.0)
    assert world.scheduler.cost.observed == 0
    plan = world.scheduler.schedule(3.0)
    world.scheduler.commit(plan, step_result(plan, [5]), 4.0)
    assert world.scheduler.cost.observed == 1


def test_the_check_sees_what_is_broken() -> None:
    world = World(config(), num_blocks=32)
    for name in "ab":
        world.add(request(name, [ord(name)]))
    world.scheduler.schedule(1.0)
    world.scheduler.check()
    one = world.scheduler._roll.requests["a"]
    one.inflight = 2
    with pytest.raises(AssertionError):
        world.scheduler.check()
    one.inflight = 1
    world.scheduler.config = replace(world.scheduler.config, max_num_seqs=1)
    with pytest.raises(AssertionError):
        world.scheduler.check()
    world.scheduler.config = replace(world.scheduler.config, max_num_seqs=2)
    world.scheduler.check()
    world.scheduler._roll.queue.fresh += 1
    with pytest.raises(AssertionError):
        world.scheduler.check()


def test_what_is_there() -> None:
    world = World(config(max_num_seqs=1), num_blocks=32)
    assert (world.scheduler.backlog(), world.scheduler.unfinished) == ((0, 0), ())
    world.add(request("a", 20, max_tokens=8))
    world.add(request("b", [5] * 3, max_tokens=2, n=2))
    assert world.scheduler.backlog() == (26, 12)
    assert world.scheduler.unfinished == ("a", "b:0", "b:1")
    assert ("b:1" in world.scheduler, "b" in world.scheduler) == (True, False)
    assert (world.scheduler.waiting, world.scheduler.deferred) == (3, 1)
    world.step()
    assert world.scheduler.backlog() == (10, 12)
    world.step()
    world.step()
    assert world.scheduler.backlog() == (6, 10)
    assert (world.scheduler.waiting, world.scheduler.deferred) == (2, 1)
    assert [each.id for each in world.scheduler.running] == ["a"]


def test_the_message_of_a_full_queue_has_its_figures() -> None:
    world = World(config(max_num_seqs=1, max_num_queued_tokens=10))
    for name, length in (("a", 4), ("b", 8), ("c", 4)):
        world.add(request(name, length))
    world.step()
    (failure,) = [event.failure for event in world.events if event.failure]
    assert failure == Failure(
        "the queue is full: 1 requests with 8 prompt tokens already wait (limit: 10 tokens).",
        type="QueueFull",
        param="max_num_queued_tokens",
    )


def test_a_stop_id_is_told_even_where_it_is_an_end_of_sequence_that_is_ignored() -> None:
    for ignore, told in ((True, 5), (False, None)):
        world = World(config())
        sampling = Sampling(stop_token_ids=(5,), ignore_eos=ignore)
        world.add(request("a", [1], eos_ids=(5,), sampling=sampling))
        plan = world.scheduler.schedule(1.0)
        (event,) = world.scheduler.commit(plan, step_result(plan, [5]), 1.0)
        assert (event.finish, event.stop_reason) == (FinishReason.STOP, told)


def test_any_of_a_step_may_fail() -> None:
    for failing in ("a", "b", "c"):
        world = World(config())
        for name in "abc":
            world.add(request(name, [ord(name)]))
        world.step(frozenset({failing}))
        assert {event.request: event.finish for event in world.events} == {
            name: FinishReason.ERROR if name == failing else None for name in "abc"
        }


def test_a_failure_that_taints_nothing_leaves_what_others_have_computed() -> None:
    world = World(config(), num_blocks=32)
    world.add(request("a", 9, max_tokens=1))
    world.run()
    assert world.scheduler.pool.cached == 2
    world.add(request("b", [5] * 9))
    world.step(frozenset({"b"}))
    assert world.scheduler.pool.cached == 2


def test_a_missing_vector_fails_its_request() -> None:
    world = World(config())
    world.add(request("a", [1], pooling=Pooling()))
    plan = world.scheduler.schedule(1.0)
    (event,) = world.scheduler.commit(plan, StepResult(plan.step, 0.5, (Outcome(),)), 1.0)
    assert event.failure == Failure("the executor returned no vector for it")


def test_nothing_is_counted_before_the_first_step() -> None:
    assert Totals() == Totals(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert EngineStats() == EngineStats(Totals(), 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


# ---------------------------------------------------------------------------- drafts


def test_a_drafter_is_asked_for_what_may_still_come() -> None:
    asked: list[tuple[int, int]] = []

    def drafter(one: Request, most: int) -> Sequence[int]:
        asked.append((len(one.tokens), most))
        return ()

    world = World(config(), num_blocks=32, drafter=drafter)
    world.add(request("a", [1, 2], max_tokens=4))
    world.run()
    assert asked == [(3, 2), (4, 1)]  # and not for the last token
    asked.clear()
    world = World(config(max_num_batched_tokens=3), num_blocks=32, drafter=drafter)
    for name in "ab":
        world.add(request(name, [1], max_tokens=9))
    world.step()
    world.step()
    assert asked == [(2, 2), (2, 1)]  # within the budget
    asked.clear()
    world = World(config(), num_blocks=32, drafter=drafter, depth=2)
    world.add(request("a", [1, 2], max_tokens=9))
    for _ in range(3):
        world.step()
    assert not asked  # while a token is under way nobody knows what to go on from


def ended(*tokens: int, eos: tuple[int, ...] = (), minimum: int = 0, drafts: int = 2) -> Event:
    """What is told of a step in which these tokens were made of one position and `drafts` guesses."""
    world = World(config(), num_blocks=32, drafter=lambda one, most: [7] * drafts)
    spec = request("a", [1], max_tokens=9, eos_ids=eos, sampling=Sampling(min_tokens=minimum, logprobs=0))
    world.scheduler.add(spec, 0.0)
    plan = world.scheduler.schedule(1.0)
    world.scheduler.commit(plan, step_result(plan, [7]), 1.0)
    plan = world.scheduler.schedule(2.0)
    told = tuple(TokenLogprob(token, -1.0, 1) for token in tokens)
    result = StepResult(plan.step, 0.5, (Outcome(tokens, told),))
    (event,) = world.scheduler.commit(plan, result, 2.0)
    world.scheduler.check()
    assert [entry.token for entry in event.logprobs] == list(event.tokens)
    assert world.scheduler.totals.generation_tokens == 1 + len(event.tokens)
    assert world.scheduler.totals.drafted_tokens == drafts
    assert world.scheduler.totals.accepted_tokens == len(tokens) - 1
    return event


def test_verified_tokens_end_at_the_one_that_stops() -> None:
    assert (ended(7, 7, 5).tokens, ended(7, 7, 5).finish) == ((7, 7, 5), None)
    assert (ended(7, 5).tokens, ended(7, 5).finish) == ((7, 5), None)
    stopped = ended(7, 5, 6, eos=(5,))
    assert (stopped.tokens, stopped.finish) == ((7, 5), FinishReason.STOP)


def test_a_stop_token_that_is_held_back_stops_nothing() -> None:
    event = ended(5, 5, 6, eos=(5,), minimum=4)
    assert (event.tokens, event.finish) == ((5, 5, 6), None)
    event = ended(5, 5, 6, eos=(5,), minimum=3)
    assert (event.tokens, event.finish) == ((5, 5), FinishReason.STOP)


# ---------------------------------------------------------------------------- sums


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [5, 7, 16])
def test_every_position_that_was_computed_is_accounted_for(
    drafts: bool, depth: int, caching: bool, budget: int
) -> None:
    """Prompt tokens once, generated ones but the last of each once, and beyond that what was computed again
    and what was drafted in vain."""
    drafter = correct_drafts if drafts else None
    limits = config(watermark=0.0, max_num_batched_tokens=budget, enable_prefix_caching=caching)
    world = World(limits, num_blocks=8, depth=depth, drafter=drafter)
    lengths = {"a": (5, 20), "b": (3, 12), "c": (9, 12), "d": (2, 20)}
    for number, (name, (prompt, output)) in enumerate(lengths.items()):
        world.add(request(name, [number * 100 + place for place in range(prompt)], max_tokens=output))
    world.run()
    totals = world.scheduler.totals
    assert totals.preemptions > 0
    assert totals.recomputed_tokens > 0
    plans = [Plan.from_json(line, world.specs) for line in world.log]
    assert totals.steps == len(plans)
    assert totals.prompt_tokens == sum(prompt for prompt, _ in lengths.values())
    assert totals.generation_tokens == sum(output for _, output in lengths.values())
    first = sum(prompt + output - 1 for prompt, output in lengths.values())
    vain = totals.drafted_tokens - totals.accepted_tokens
    assert sum(plan.tokens for plan in plans) == first + totals.recomputed_tokens + vain
    assert totals.drafted_tokens == sum(len(item.drafts) for plan in plans for item in plan.items)
    sampled = sum(bool(item.samples) for plan in plans for item in plan.items)
    assert totals.generation_tokens == sampled + totals.accepted_tokens
