"""Scheduler: examples of each rule, and properties over random histories."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import ContextLengthExceeded, InvalidRequest
from penstock.core.plan import Plan, StepResult
from penstock.core.request import FinishReason
from penstock.core.sampling_params import SamplingParams
from penstock.core.scheduler import PROMPT_TOKENS_PER_DECODE, SchedulerConfig

from .world import World, config, request


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
    world.add(request("0", 30, max_tokens=4))
    world.add(request("1", 30, max_tokens=4, leader="0"))
    assert shape(world.step()) == {"0": 16}
    assert shape(world.step()) == {"0": 14, "1": 2}
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
    params = SamplingParams(prompt_logprobs=1, max_tokens=4)
    world = World(config(max_num_batched_tokens=64), num_blocks=32)
    world.add(request("a", 13))
    world.add(request("b", 13, params=params))
    assert shape(world.step()) == {"a": 13, "b": 13}


def test_the_queue_is_bounded_after_admission() -> None:
    world = World(config(max_num_seqs=2, max_num_queued_reqs=1))
    for name in "abcd":
        world.add(request(name, [1]))
    world.step()
    refused = [event for event in world.events if event.error_type == "QueueFull"]
    assert [event.request for event in refused] == ["d"]
    assert "the queue is full: 1 requests" in (refused[0].error or "")
    world.run()


def test_siblings_are_refused_with_their_leader() -> None:
    world = World(config(max_num_seqs=1, max_num_queued_reqs=0))
    world.add(request("a", [1]))
    world.step()
    world.add(request("b", [2]))
    world.add(request("b'", [2], leader="b"))
    world.step()
    assert [event.request for event in world.events if event.error] == ["b", "b'"]
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
    assert [event.request for event in world.events if event.error] == ["c"]
    world.run()


def test_stop_tokens() -> None:
    token = World.next_token([1, 2, 3])
    cases = {
        "eos": (frozenset({token}), SamplingParams(), FinishReason.STOP, None, 1),
        "stop id": (frozenset(), SamplingParams(stop_token_ids=(token,)), FinishReason.STOP, token, 1),
        "held back": (frozenset({token}), SamplingParams(min_tokens=2), FinishReason.LENGTH, None, 8),
        "neither": (frozenset(), SamplingParams(), FinishReason.LENGTH, None, 8),
    }
    for name, (eos, params, reason, stop_reason, count) in cases.items():
        world = World(config())
        world.add(request(name, [1, 2, 3], params=params, eos_ids=eos))
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
    assert last["a"].error == "planned failure"
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
    events = world.scheduler.commit(plan, StepResult(step=0, seconds=0.1), world.now)
    world.scheduler.check()
    assert [(event.finish, event.error) for event in events] == [
        (FinishReason.ERROR, "the executor returned no token for it")
    ]


def test_results_of_aborted_requests_are_dropped_and_their_time_is_not_lost() -> None:
    world = World(config())
    world.add(request("a", [1]))
    world.add(request("b", [2]))
    plan = world.scheduler.schedule(1.0)
    world.abort("a")
    events = world.scheduler.commit(plan, StepResult(step=0, seconds=1.0, tokens={"a": 1, "b": 1}), 2.0)
    assert [event.request for event in events] == ["b"]
    assert world.scheduler.unbilled + events[0].device_seconds == pytest.approx(1.0)


# ---------------------------------------------------------------------------- properties

histories = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1), st.integers(0, 3)
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


def play(history: list[tuple[object, ...]], settings_: object, blocks: int) -> World:
    """Run a history to its end; the world checks all invariants after every call."""
    world = World(settings_, num_blocks=blocks)  # type: ignore[arg-type]
    names: list[str] = []
    for what, *args in history:
        if what == "add":
            length, output, priority, kind = args
            name = f"r{len(names)}"
            leader = names[-1] if kind == 3 and names else None
            # kinds 0 and 1 share long prefixes
            base = 0 if kind < 2 else 100 * len(names)
            new = request(
                name,
                [base + i // 2 for i in range(length)],  # type: ignore[operator, call-overload]
                max_tokens=output,  # type: ignore[arg-type]
                priority=priority,
                leader=leader,
                params=SamplingParams(max_tokens=output),  # type: ignore[arg-type]
            )
            names.append(name)
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


@settings(max_examples=300, deadline=None)
@given(histories, limits, st.integers(11, 24))
def test_any_history_ends_clean(history: list[tuple[object, ...]], settings_: object, blocks: int) -> None:
    """No leak, no starvation, every request ends exactly once, and no position is skipped or misread."""
    world = play(history, settings_, blocks)
    ends = [event.request for event in world.events if event.finish is not None]
    added = sum(1 for what, *_ in history if what == "add")
    assert sorted(ends) == sorted(f"r{i}" for i in range(added))
    assert world.scheduler.pool.available == blocks
    assert not world.scheduler.running
    assert not world.scheduler.waiting


@settings(max_examples=100, deadline=None)
@given(histories, limits, st.integers(11, 24))
def test_limits_of_a_step_hold(
    history: list[tuple[object, ...]], settings_: SchedulerConfig, blocks: int
) -> None:
    for line in play(history, settings_, blocks).log:
        plan = Plan.from_json(line)
        prompts = [item.tokens for item in plan.items if item.tokens > 1 or not item.sample]
        fresh = {admission.request for admission in plan.admitted}
        decodes = sum(i.tokens == 1 and i.sample and i.request not in fresh for i in plan.items)
        assert plan.tokens <= settings_.max_num_batched_tokens
        assert len(plan.items) <= settings_.max_num_seqs
        if settings_.long_prefill_token_threshold:
            assert max(prompts, default=0) <= settings_.long_prefill_token_threshold
        if settings_.max_num_mixed_prefill_tokens and decodes:
            most = settings_.max_num_mixed_prefill_tokens + PROMPT_TOKENS_PER_DECODE * decodes
            assert sum(prompts) <= most


@settings(max_examples=100, deadline=None)
@given(histories, limits, st.integers(11, 24))
def test_the_same_history_gives_a_byte_identical_plan_log(
    history: list[tuple[object, ...]], settings_: object, blocks: int
) -> None:
    assert play(history, settings_, blocks).log == play(history, settings_, blocks).log


@settings(max_examples=100, deadline=None)
@given(histories, limits, st.integers(11, 24))
def test_every_step_is_paid_in_full(
    history: list[tuple[object, ...]], settings_: object, blocks: int
) -> None:
    """Σ bills of all requests (last event of each) + what fell to ended ones == Σ seconds of all steps."""
    world = play(history, settings_, blocks)
    bills = sum(event.device_seconds for event in world.events if event.finish is not None)
    assert bills + world.scheduler.unbilled == pytest.approx(0.5 * len(world.log))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=6),
    limits,
    limits,
    st.integers(11, 24),
)
def test_tokens_do_not_depend_on_limits_or_company(
    work: list[tuple[int, int]], one: object, other: object, blocks: int
) -> None:
    """Chunk size, batch, preemption and prefix hits change when a token is made, never which."""
    outputs = []
    for settings_, count in ((one, blocks), (other, 64)):
        history: list[tuple[object, ...]] = [("add", length, output, 0, 0) for length, output in work]
        world = play(history, settings_, count)
        made: dict[str, tuple[int, ...]] = {}
        for event in world.events:
            made[event.request] = made.get(event.request, ()) + event.tokens
        outputs.append(made)
    for name in set(outputs[0]) & set(outputs[1]):
        if outputs[0][name] and outputs[1][name]:  # a bounded queue may refuse it in one of the worlds
            assert outputs[0][name] == outputs[1][name]


def test_plans_survive_json() -> None:
    world = World(config())
    world.add(request("a", 5, params=SamplingParams(logit_bias={3: 1.5}, stop=("x",), stop_token_ids=(7,))))
    world.add(request("b", [1, 2], eos_ids=frozenset({4})))
    plan = world.step()
    assert Plan.from_json(plan.to_json()) == plan
