"""Scheduler: examples of each rule, and properties over random histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.draft import PROMPT_TOKENS_PER_DECODE
from penstock.core.errors import ContextLengthExceeded, InvalidRequest
from penstock.core.plan import Failure, Outcome, Plan, StepResult
from penstock.core.policy import Policy, View
from penstock.core.pooling import Vectors
from penstock.core.request import Request
from penstock.core.request_spec import FinishReason, InputSpan, Pooling
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import SchedulerConfig

from .world import World, config, correct_drafts, request, step_result


def shape(plan: Plan) -> dict[str, int]:
    return {item.request: item.tokens for item in plan.items}


# ---------------------------------------------------------------------------- rules


def test_decodes_go_before_prompts_and_a_prompt_takes_the_rest_of_the_budget() -> None:
    world = World(config(max_num_batched_tokens=8), num_blocks=32)
    world.add(request("short", [1, 2]))
    world.step()
    world.add(request("long", 20))
    assert shape(world.step()) == {"short": 1, "long": 7}
    assert shape(world.step()) == {"short": 1, "long": 7}


def test_the_threshold_limits_one_prompt_but_not_several() -> None:
    world = World(config(long_prefill_token_threshold=5), num_blocks=32)
    world.add(request("a", 12))
    world.add(request("b", [5] * 12))
    assert shape(world.step()) == {"a": 5, "b": 5}


def test_all_prompts_together_are_limited_where_others_decode() -> None:
    world = World(config(max_num_mixed_prefill_tokens=1), num_blocks=32)
    world.add(request("a", 3, max_tokens=3))
    world.add(request("b", [5] * 11))
    assert shape(world.step()) == {"a": 3, "b": 11}
    world.add(request("c", [6] * 12))
    world.add(request("d", [7] * 7))
    assert shape(world.step()) == {"a": 1, "b": 1, "c": 9}  # 1, and 4 for each of a and b
    assert shape(world.step()) == {"a": 1, "b": 1, "c": 3, "d": 6}
    world.run()


def test_admission_is_strict_in_order() -> None:
    """A small request does not overtake a big one that does not fit yet."""
    world = World(config(watermark=0.0), num_blocks=6)
    world.add(request("first", 16, max_tokens=2))
    world.step()
    world.add(request("big", [7] * 16, max_tokens=2))
    world.add(request("small", [8, 9], max_tokens=2))
    assert shape(world.step()) == {"first": 1}
    world.run()
    starts = [event.request for event in world.events if event.tokens]
    assert starts.index("big") <= starts.index("small")


def test_a_request_that_needs_a_block_preempts_the_youngest() -> None:
    world = World(config(watermark=0.0), num_blocks=4)
    world.add(request("old", [1, 2, 3, 4], max_tokens=8))
    world.add(request("young", [5, 6, 7, 8], max_tokens=8))
    world.run()
    last = {event.request: event for event in world.events if event.finish}
    assert last["old"].preemptions == 0
    assert last["young"].preemptions >= 1
    assert all(event.finish is FinishReason.LENGTH for event in last.values())


def test_priority_serves_lower_numbers_first_and_preempts_the_least_urgent() -> None:
    world = World(config(policy="priority", max_num_seqs=1))
    world.add(request("later", [1], max_tokens=1, priority=5))
    world.add(request("urgent", [2], max_tokens=1, priority=-1))
    world.run()
    assert [event.request for event in world.events] == ["urgent", "later"]


def test_a_preempted_request_resumes_through_its_cached_prefix() -> None:
    world = World(config(watermark=0.0), num_blocks=8)
    world.add(request("old", [1, 2, 3, 4], max_tokens=26))
    world.add(request("young", list(range(50, 66)), max_tokens=8))
    world.run()
    assert world.scheduler.totals.preemptions == 1
    assert world.scheduler.totals.recomputed_tokens < 16 + 8


def test_the_same_prompt_is_computed_once_even_within_one_step() -> None:
    world = World(config(max_num_batched_tokens=64), num_blocks=32)
    for name in "abc":
        world.add(request(name, 13, max_tokens=1))
    assert shape(world.step()) == {"a": 13, "b": 1, "c": 1}
    assert {event.request: event.cached for event in world.events} == {"a": 0, "b": 12, "c": 12}


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_wait_for_their_leader_and_share_its_prompt(caching: bool) -> None:
    world = World(config(enable_prefix_caching=caching), num_blocks=32)
    world.add(request("a", 30, max_tokens=4, n=2))
    assert (world.scheduler.waiting, world.scheduler.deferred) == (2, 1)
    assert shape(world.step()) == {"a:0": 16}
    assert shape(world.step()) == {"a:0": 14, "a:1": 2}
    world.run()


def test_without_prefix_caching_nothing_is_shared() -> None:
    world = World(config(enable_prefix_caching=False, max_num_batched_tokens=64), num_blocks=32)
    world.add(request("a", 13))
    world.add(request("b", 13))
    assert shape(world.step()) == {"a": 13, "b": 13}


def test_salts_isolate() -> None:
    world = World(config(max_num_batched_tokens=64), num_blocks=32)
    world.add(request("a", 13, cache_salt="tenant 1"))
    world.add(request("b", 13, cache_salt="tenant 2"))
    world.add(request("c", 13, cache_salt="tenant 1"))
    assert shape(world.step()) == {"a": 13, "b": 13, "c": 1}


def test_prompt_logprobs_need_every_position() -> None:
    sampling = Sampling(prompt_logprobs=1)
    world = World(config(max_num_batched_tokens=64), num_blocks=32)
    world.add(request("a", 13))
    world.add(request("b", 13, sampling=sampling))
    assert shape(world.step()) == {"a": 13, "b": 13}


def test_the_queue_is_bounded_after_admission() -> None:
    world = World(config(max_num_seqs=2, max_num_queued_reqs=1))
    for name in "abcd":
        world.add(request(name, [1]))
    world.step()
    refused = [(event.request, event.failure) for event in world.events if event.failure]
    ((name, failure),) = refused
    assert name == "d"
    assert (failure.type, failure.param) == ("QueueFull", "max_num_queued_reqs")
    assert "the queue is full: 1 requests" in failure.cause
    assert "limit: 1 requests" in failure.cause
    world.run()


def test_siblings_are_refused_with_their_leader() -> None:
    world = World(config(max_num_seqs=1, max_num_queued_reqs=0))
    world.add(request("a", [1]))
    world.step()
    world.add(request("b", [2], n=2))
    world.step()
    assert [event.request for event in world.events if event.failure] == ["b:0", "b:1"]
    world.run()


def test_prompt_tokens_are_counted_once_and_recomputed_ones_apart() -> None:
    world = World(config(watermark=0.0), num_blocks=8)
    world.add(request("old", [1, 2, 3, 4], max_tokens=26))
    world.add(request("young", list(range(50, 66)), max_tokens=8))
    world.run()
    totals = world.scheduler.totals
    assert totals.preemptions > 0
    assert totals.prompt_tokens + totals.cached_tokens == 20
    assert totals.recomputed_tokens > 0


def test_steps_that_failed_teach_the_cost_model_nothing() -> None:
    world = World(config())
    world.add(request("a", [1]))
    world.add(request("b", [2]))
    world.step(failing=frozenset({"a"}))
    assert world.scheduler.cost.observed == 0
    world.run()
    assert world.scheduler.cost.observed > 0


def test_the_queue_is_bounded_in_tokens() -> None:
    world = World(config(max_num_seqs=1, max_num_queued_tokens=10))
    world.add(request("a", 4))
    world.add(request("b", 8))
    world.add(request("c", 4))
    world.step()
    assert [event.request for event in world.events if event.failure] == ["c"]
    world.run()


def test_stop_tokens() -> None:
    token = World.next_token([1, 2, 3])
    cases: dict[str, tuple[tuple[int, ...], Sampling, FinishReason, int | None, int]] = {
        "eos": ((token,), Sampling(), FinishReason.STOP, None, 1),
        "stop id": ((), Sampling(stop_token_ids=(token,)), FinishReason.STOP, token, 1),
        "held back": ((token,), Sampling(min_tokens=2), FinishReason.LENGTH, None, 8),
        "neither": ((), Sampling(), FinishReason.LENGTH, None, 8),
    }
    cases["ignored"] = ((token,), Sampling(ignore_eos=True), FinishReason.LENGTH, None, 8)
    for name, (eos, sampling, reason, stop_reason, count) in cases.items():
        world = World(config())
        world.add(request(name, [1, 2, 3], sampling=sampling, eos_ids=eos))
        world.run()
        last = world.events[-1]
        assert (last.finish, last.stop_reason) == (reason, stop_reason), name
        assert sum(len(event.tokens) for event in world.events) == count, name


def test_what_can_never_run_is_refused_at_once() -> None:
    world = World(config(max_model_len=100), num_blocks=5)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        world.add(request("a", []))
    with pytest.raises(ContextLengthExceeded, match=r"prompt \(99 tokens\) and max_tokens \(8\)"):
        world.add(request("b", 99))
    with pytest.raises(ContextLengthExceeded, match="whole KV cache holds 20"):
        world.add(request("c", 15))
    world.add(request("d", [1]))
    with pytest.raises(InvalidRequest, match="already in use"):
        world.add(request("d", [1]))
    world.run()


def test_a_failed_request_takes_nobody_along() -> None:
    """`b` shared the blocks that `a` was to fill in the same step, so it has to start over; `c` goes on."""
    world = World(config(max_num_batched_tokens=64), num_blocks=32)
    world.add(request("a", 13))
    world.add(request("b", 13))
    world.add(request("c", [3, 4, 5]))
    world.step(failing=frozenset({"a"}))
    last = {event.request: event for event in world.events}
    assert last["a"].finish is FinishReason.ERROR
    assert last["a"].failure is not None
    assert last["a"].failure.cause == "planned failure"
    assert "b" not in last
    assert last["c"].tokens
    assert shape(world.step()) == {"c": 1, "b": 13}
    world.run()
    assert {event.request for event in world.events if event.finish is FinishReason.LENGTH} == {"b", "c"}


def test_a_missing_token_fails_only_its_request() -> None:
    world = World(config())
    world.add(request("a", [1]))
    world.now += 1
    plan = world.scheduler.schedule(world.now)
    (event,) = world.scheduler.commit(plan, step_result(plan, ()), world.now)
    world.scheduler.check()
    assert event.finish is FinishReason.ERROR
    assert event.failure is not None
    assert event.failure.cause == "the executor returned no token for it"


def test_who_is_aborted_in_a_step_under_way_gets_the_last_event_with_the_whole_bill() -> None:
    world = World(config())
    world.add(request("a", [1]))
    world.add(request("b", [2]))
    plan = world.scheduler.schedule(1.0)
    world.abort("a")
    assert not world.events
    with pytest.raises(InvalidRequest, match="already in use"):
        world.add(request("a", [1]))
    world.abort("a")
    events = world.scheduler.commit(plan, step_result(plan, [1], [1]), 2.0)
    world.scheduler.check()
    a, b = events
    assert (a.request, a.finish, a.tokens) == ("a", FinishReason.ABORT, ())
    assert (b.request, b.finish, b.tokens) == ("b", None, (1,))
    assert a.device_seconds + b.device_seconds == pytest.approx(1.0)
    world.add(request("a", [1]))


def test_plans_are_committed_in_order_and_with_an_outcome_for_each_item() -> None:
    world = World(config())
    world.add(request("a", [1]))
    first, second = world.scheduler.schedule(1.0), world.scheduler.schedule(1.0)
    assert [item.start for plan in (first, second) for item in plan.items] == [0, 1]
    with pytest.raises(ValueError, match="not the next"):
        world.scheduler.commit(second, step_result(second, [1]), 2.0)
    with pytest.raises(ValueError, match="0 outcomes"):
        world.scheduler.commit(first, step_result(first), 2.0)
    for plan in (first, second):
        world.scheduler.commit(plan, step_result(plan, [1]), 2.0)
    with pytest.raises(ValueError, match="not the next"):
        world.scheduler.commit(second, step_result(second, [1]), 2.0)


def test_no_result_reaches_a_later_life_of_a_request() -> None:
    """`b` stands on what `a` was to compute, and is in the next step, too, before it is known."""
    world = World(config(max_num_batched_tokens=64), num_blocks=32, depth=2)
    world.add(request("a", 13))
    world.add(request("b", 13))
    world.step(failing=frozenset({"a"}))
    world.run()
    tokens = [token for event in world.events if event.request == "b" for token in event.tokens]
    assert len(tokens) == 8
    assert -7 not in tokens
    plans = [Plan.from_json(line, world.specs) for line in world.log]
    epochs = [item.epoch for plan in plans for item in plan.items if item.request == "b"]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) == 2


@pytest.mark.parametrize("leaves", ["starts over", "is aborted", "is aborted in the next step"])
def test_what_was_computed_on_worthless_ground_is_never_found(leaves: str) -> None:
    """`b` goes on from the block that `a` should have filled. When somebody fills it anew, the chain of
    hashes leads on to what `b` had computed."""
    later = leaves == "is aborted in the next step"
    world = World(config(max_num_batched_tokens=64, max_num_seqs=9), num_blocks=32, depth=2)
    prompt = list(range(13))
    world.add(request("a", prompt[:5]))
    if not later:
        world.add(request("b", prompt))
    fails = world.plan(frozenset({"a"}))
    if later:
        world.add(request("b", prompt))
    world.plan()
    assert [item.start for item in world.flights[1 if later else 0].items if item.request == "b"] == [4]
    if leaves != "starts over":
        world.abort("b")
    assert fails.step == 0
    world.run()
    for name in ("c", "d"):
        world.add(request(name, prompt, max_tokens=2))
        world.run()
    assert world.events[-1].cached == 12
    assert all(-7 not in event.tokens for event in world.events)


def test_what_is_built_on_tainted_blocks_is_not_found_either() -> None:
    """`a`'s numbers were broken from its first step on; `b` has gone on from its block, and has left."""
    world = World(config(), num_blocks=32)
    prompt = list(range(13))
    world.add(request("a", prompt[:5]))
    world.step()
    world.add(request("b", prompt))
    world.step()
    assert world.scheduler.totals.cached_tokens == 4
    world.abort("b")
    plan = world.scheduler.schedule(9.0)
    tainted = Outcome(failure=Failure("NaN", tainted=True))
    world.scheduler.commit(plan, StepResult(plan.step, 0.5, (tainted,)), 9.0)
    world.scheduler.check()
    assert not world.scheduler.pool.cached


def test_drafts_stay_within_the_budget() -> None:
    world = World(config(max_num_batched_tokens=5), num_blocks=32, drafter=lambda request, most: [1] * most)
    for name in "abcd":
        world.add(request(name, [ord(name)], max_tokens=6))
    while world.scheduler.has_work:
        assert world.step().tokens <= 5
    assert world.scheduler.totals.drafted_tokens > 0


def test_a_chunk_that_is_under_way_is_not_told_twice() -> None:
    """Its request is preempted, and computes the prompt again from its start."""
    world = World(config(watermark=0.0, max_num_batched_tokens=5), num_blocks=8, depth=2)
    world.add(request("a", [1] * 7, max_tokens=20))
    for _ in range(4):
        world.step()
    prompt = list(range(21, 40))
    world.add(request("b", prompt, max_tokens=2, sampling=Sampling(prompt_logprobs=0)))
    world.run()
    assert world.scheduler.totals.preemptions > 0
    told = [event.prompt_logprobs for event in world.events if event.prompt_logprobs is not None]
    assert [[entry.token for entry in entries] for entries in told] == [prompt[1:]]


def test_reset_leaves_nobody_and_nothing() -> None:
    world = World(config(), num_blocks=32, depth=2)
    for name in ("a", "b"):
        world.add(request(name, 13, n=2))
    world.step()
    world.scheduler.reset()
    world.scheduler.check()
    assert not world.scheduler.has_work
    assert world.scheduler.pool.available == 32
    world.add(request("a", 13))
    plan = world.scheduler.schedule(9.0)
    assert set(plan.released) == {"a:0", "a:1", "b:0", "b:1"}
    assert [item.start for item in plan.items] == [0]


def test_a_policy_that_gives_two_the_same_place_is_told() -> None:
    class Careless(Fair):
        dynamic = False

        def order(self, request: Request, view: View) -> tuple[float, ...]:
            return (0.0,)

    world = World(config(), num_blocks=32, policy=Careless())
    for name, count in (("a", 2), ("b", 1)):
        world.scheduler.add(request(name, [1], max_tokens=count), 0.0)
    plan = world.scheduler.schedule(0.0)
    with pytest.raises(RuntimeError, match="policy fair gives two requests the same place"):
        world.scheduler.commit(plan, step_result(plan, [1], [1]), 0.0)


def test_a_victim_waits_for_the_token_that_is_under_way() -> None:
    """With three steps in flight it may be first in the queue while one of its tokens is not known yet."""
    world = World(config(watermark=0.0), num_blocks=5, depth=3)
    world.add(request("old", [1], max_tokens=5))
    world.add(request("middle", [9] * 7))
    world.add(request("young", [5]))
    world.run()
    assert world.scheduler.totals.preemptions >= 1
    assert {name: len(tokens) for name, tokens in outputs(world).items()} == {
        "old": 5,
        "middle": 8,
        "young": 8,
    }


def test_an_end_that_is_seen_late_is_told_when_its_bill_is_whole() -> None:
    token = World.next_token([1, 2, 3])
    world = World(config(), depth=2)
    world.add(request("a", [1, 2, 3], eos_ids=(token,)))
    world.run()
    (event,) = world.events
    assert (event.tokens, event.finish) == ((token,), FinishReason.STOP)
    assert event.device_seconds == pytest.approx(2 * 0.5)
    assert world.scheduler.totals.generation_tokens == 1


def test_pooling_ends_with_the_prompt() -> None:
    world = World(config())
    world.add(request("long", 20, pooling=Pooling()))
    world.add(request("short", [5], pooling=Pooling()))
    world.run()
    assert {event.request: event.pooled for event in world.events} == {
        "long": Vectors.of((float(sum(range(1000, 1020))),)),
        "short": Vectors.of((5.0,)),
    }
    assert all(event.finish is FinishReason.STOP and not event.tokens for event in world.events)
    with pytest.raises(InvalidRequest, match="either samples or pools"):
        world.add(request("both", 3, pooling=Pooling(), sampling=Sampling()))


def test_other_content_is_another_prefix() -> None:
    world = World(config(max_num_batched_tokens=100, max_num_seqs=9), num_blocks=64)
    world.add(request("a", 13, inputs=(InputSpan(2, 4, "cat"),)))
    world.add(request("b", 13, inputs=(InputSpan(2, 4, "cat"),)))
    world.add(request("c", 13, inputs=(InputSpan(2, 4, "dog"),)))
    world.add(request("d", 13, inputs=(InputSpan(5, 4, "cat"),)))
    world.add(request("e", 13))
    world.add(request("f", 13, tenant="other"))
    world.add(request("g", 13, adapter="lora"))
    plan = world.scheduler.schedule(1.0)
    assert shape(plan) == {"a": 13, "b": 1, "c": 13, "d": 13, "e": 9, "f": 13, "g": 13}


class Fair:
    """The tenant that has had least goes first; its last request yields first."""

    name, dynamic = "fair", True

    def order(self, request: Request, view: View) -> tuple[float, ...]:
        return (view.served.get(request.spec.tenant, 0.0), request.arrival)

    def victim(self, running: Sequence[Request], view: View) -> Request:
        return running[-1]


class Deadlines(Fair):
    """The least time left first, and background when nobody else is there."""

    def order(self, request: Request, view: View) -> tuple[float, ...]:
        late = request.spec.deadline is not None and request.spec.deadline < view.now
        return (late, request.spec.deadline or 0.0, request.arrival)


def test_a_policy_can_be_fair_between_tenants() -> None:
    world = World(config(max_num_seqs=1), num_blocks=32, policy=Fair())
    for number in range(4):
        world.add(request(f"greedy {number}", [number], max_tokens=3, tenant="greedy"))
    world.add(request("modest", [9], max_tokens=3, tenant="modest"))
    world.run()
    ends = [event.request for event in world.events if event.finish]
    assert ends[:2] == ["greedy 0", "modest"]


def test_whoever_comes_later_is_not_owed_what_others_had_before() -> None:
    world = World(config(max_num_seqs=1), num_blocks=32, policy=Fair())
    for number in range(4):
        world.add(request(f"old {number}", [number], max_tokens=4, tenant="old"))
    for _ in range(9):
        world.step()
    for number in range(2):
        world.add(request(f"new {number}", [5, number], max_tokens=4, tenant="new"))
    world.run()
    ends = [event.request for event in world.events if event.finish]
    assert ends[:3] == ["old 0", "old 1", "old 2"]
    assert ends[3:] == ["new 0", "old 3", "new 1"]  # by turns, and not "new" until it has had as much


def test_followers_take_the_rank_that_they_have_when_they_may_come() -> None:
    """Their deadline has passed while their leader was busy."""
    world = World(config(max_num_seqs=1, max_num_batched_tokens=4), num_blocks=32, policy=Deadlines())
    world.add(request("pair", list(range(50, 70)), max_tokens=2, deadline=4.0, n=2))
    world.add(request("other", [9], max_tokens=2, deadline=90.0))
    world.run()
    ends = [event.request for event in world.events if event.finish]
    assert ends == ["pair:0", "other", "pair:1"]


def test_a_policy_can_look_at_the_time() -> None:
    world = World(config(max_num_seqs=1), num_blocks=32, policy=Deadlines())
    for name, deadline in (("a", 3.0), ("b", 50.0), ("c", 2.0), ("hopeless", 1.0)):
        world.add(request(name, [ord(name[0])], max_tokens=3, deadline=deadline))
    world.now = 1.0
    world.run()
    assert [event.request for event in world.events if event.finish] == ["c", "b", "hopeless", "a"]


def test_drafts_that_are_right_make_several_tokens_of_a_step() -> None:
    made = []
    for drafter in (None, correct_drafts):
        world = World(config(), num_blocks=64, drafter=drafter)
        world.add(request("a", [1, 2, 3], max_tokens=20))
        world.add(request("b", [4], max_tokens=20, sampling=Sampling(stop_token_ids=tuple(range(30)))))
        world.run()
        tokens: dict[str, list[int]] = {"a": [], "b": []}
        for event in world.events:
            tokens[event.request] += event.tokens
        made.append((tokens, world.events[-1].finish, world.scheduler.totals.generation_tokens))
        steps = world.scheduler.totals.steps
    assert made[0] == made[1]
    assert steps < 15
    totals = world.scheduler.totals
    assert 0 < totals.accepted_tokens < totals.drafted_tokens


# ---------------------------------------------------------------------------- properties

histories = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1), st.integers(0, 5)
        ),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 20)),
    ),
    max_size=40,
)

limits = st.builds(
    config,
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(5, 24),
    policy=st.sampled_from(["fcfs", "priority"]),
    enable_prefix_caching=st.booleans(),
    long_prefill_token_threshold=st.integers(0, 7),
    max_num_mixed_prefill_tokens=st.integers(0, 6),
    max_num_queued_reqs=st.one_of(st.none(), st.integers(0, 4)),
    watermark=st.sampled_from([0.0, 0.2]),
)


policies = st.sampled_from([None, Fair(), Deadlines()])
hosts = st.sampled_from([0, 2, 30])
"""Blocks of the host: none, too few, enough."""


def play(
    history: list[tuple[object, ...]],
    settings_: object,
    blocks: int,
    depth: int = 1,
    drafts: bool = False,
    policy: Policy | None = None,
    host: int = 0,
) -> World:
    """Run a history to its end; the world checks all invariants after every call."""
    drafter = correct_drafts if drafts else None
    world = World(
        settings_,  # type: ignore[arg-type]
        num_blocks=blocks,
        depth=depth,
        drafter=drafter,
        policy=policy,
        host_blocks=host,
    )
    names: list[str] = []
    for what, *args in history:
        if what == "add":
            length, output, priority, kind = args
            name = f"r{len(names)}"
            # kinds 0 and 1 share long prefixes
            base = 0 if kind < 2 else 100 * len(names)  # type: ignore[operator]
            new = request(
                name,
                [base + i // 2 for i in range(length)],  # type: ignore[call-overload]
                max_tokens=output,  # type: ignore[arg-type]
                priority=priority,
                n=2 if kind == 3 else 1,
                pooling=Pooling() if kind == 4 else None,
                sampling=None if kind == 4 else Sampling(prompt_logprobs=0 if kind == 5 else None),
                tenant=str(priority),
                deadline=float(length),  # type: ignore[arg-type]
            )
            names += new.ids
            world.add(new)
        elif what == "abort" and names:
            world.abort(names[args[0] % len(names)])  # type: ignore[operator]
        elif what == "step":
            for _ in range(args[0]):  # type: ignore[call-overload]
                world.step()
        elif what == "fail" and names:
            world.step(frozenset({names[args[0] % len(names)]}))  # type: ignore[operator]
    world.run()
    return world


def outputs(world: World) -> dict[str, tuple[int, ...]]:
    """Tokens of each request that came to its own end."""
    made: dict[str, tuple[int, ...]] = {}
    for event in world.events:
        made[event.request] = made.get(event.request, ()) + event.tokens
    ends = {event.request: event.finish for event in world.events if event.finish}
    return {name: tokens for name, tokens in made.items() if ends[name] is FinishReason.LENGTH}


@settings(max_examples=300, deadline=None)
@given(histories, limits, st.integers(11, 24), st.integers(1, 3), st.booleans(), policies, hosts)
def test_any_history_ends_clean(
    history: list[tuple[object, ...]],
    settings_: object,
    blocks: int,
    depth: int,
    drafts: bool,
    policy: Policy | None,
    host: int,
) -> None:
    """No leak, no starvation, every request ends exactly once, no position is skipped or misread, and nobody
    is told what stands on keys and values that were never computed."""
    world = play(history, settings_, blocks, depth, drafts, policy, host)
    ends = [event.request for event in world.events if event.finish is not None]
    assert sorted(ends) == sorted(name for spec in world.specs.values() for name in spec.ids)
    assert world.scheduler.pool.available == blocks
    assert world.scheduler.swaps.usage == 0
    assert not world.scheduler.running
    assert not world.scheduler.waiting
    assert all(-7 not in event.tokens and event.pooled != Vectors.of((-7.0,)) for event in world.events)
    prompts = {name: spec.prompts[0].token_ids for spec in world.specs.values() for name in spec.ids}
    for event in world.events:
        if event.prompt_logprobs is not None:
            assert [entry.token for entry in event.prompt_logprobs] == [*prompts[event.request][1:]]
    assert not world.scheduler._roll.view.served  # nothing is kept of tenants that are not here


@settings(max_examples=100, deadline=None)
@given(histories, limits, st.integers(11, 24), st.integers(1, 2))
def test_limits_of_a_step_hold(
    history: list[tuple[object, ...]], settings_: SchedulerConfig, blocks: int, depth: int
) -> None:
    world = play(history, settings_, blocks, depth)
    for line in world.log:
        plan = Plan.from_json(line, world.specs)
        prompts = [item.tokens for item in plan.items if item.tokens > 1 or not (item.samples or item.pools)]
        fresh = {admission.request for admission in plan.admitted}
        begun = [item for item in plan.items if item.request not in fresh]
        decodes = sum(item.tokens == 1 and bool(item.samples or item.pools) for item in begun)
        assert plan.tokens <= settings_.max_num_batched_tokens
        assert len(plan.items) <= settings_.max_num_seqs
        if settings_.long_prefill_token_threshold:
            assert max(prompts, default=0) <= settings_.long_prefill_token_threshold
        if settings_.max_num_mixed_prefill_tokens and decodes:
            most = settings_.max_num_mixed_prefill_tokens + PROMPT_TOKENS_PER_DECODE * decodes
            assert sum(prompts) <= most


@settings(max_examples=100, deadline=None)
@given(histories, limits, st.integers(11, 24), st.integers(1, 2), hosts)
def test_the_same_history_gives_a_byte_identical_plan_log(
    history: list[tuple[object, ...]], settings_: object, blocks: int, depth: int, host: int
) -> None:
    first, second = (play(history, settings_, blocks, depth, host=host) for _ in range(2))
    assert first.log == second.log


@settings(max_examples=100, deadline=None)
@given(histories, limits, st.integers(11, 24), st.integers(1, 3), st.booleans(), hosts)
def test_every_step_is_paid_in_full(
    history: list[tuple[object, ...]], settings_: object, blocks: int, depth: int, drafts: bool, host: int
) -> None:
    """Σ bills of all requests (last event of each) == Σ seconds of all steps."""
    world = play(history, settings_, blocks, depth, drafts, host=host)
    bills = sum(event.device_seconds for event in world.events if event.finish is not None)
    assert bills == pytest.approx(0.5 * len(world.log))


@settings(max_examples=150, deadline=None)
@given(
    histories,
    limits,
    limits,
    st.integers(11, 24),
    st.integers(1, 3),
    st.booleans(),
    hosts,
)
def test_tokens_do_not_depend_on_limits_or_company(
    history: list[tuple[object, ...]],
    one: object,
    other: object,
    blocks: int,
    depth: int,
    drafts: bool,
    host: int,
) -> None:
    """Chunk size, batch, preemption, copies to the host, prefix hits, failures of others, steps in flight and
    drafts change when a token is made, never which."""
    outputs_ = [
        outputs(play(history, settings_, count, steps, guessing, host=kept))
        for settings_, count, steps, guessing, kept in (
            (one, blocks, depth, drafts, host),
            (other, 64, 1, False, 0),
        )
    ]
    for name in set(outputs_[0]) & set(outputs_[1]):  # others were refused, aborted or failed in one of them
        assert outputs_[0][name] == outputs_[1][name]


def test_plans_survive_json() -> None:
    world = World(config(), drafter=correct_drafts)
    sampling = Sampling(logit_bias={3: 1.5}, stop_token_ids=(7,))
    world.add(request("a", 5, sampling=sampling, n=2))
    world.add(request("b", [1, 2], eos_ids=(4,), pooling=Pooling()))
    for _ in range(4):
        plan = world.step()
        assert Plan.from_json(plan.to_json(), world.specs) == plan
        bare = replace(plan, admitted=tuple(each.without_prompts() for each in plan.admitted))
        assert bare.to_json() == plan.to_json()
