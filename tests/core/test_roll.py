"""Who is here: last events have all figures, tenants come and go, every invariant is seen to be checked."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import pytest

from penstock.core.plan import Event
from penstock.core.request import Request, State
from penstock.core.request_spec import FinishReason
from penstock.core.roll import Roll
from penstock.core.sampling_params import Sampling

from .test_scheduler import Fair
from .world import World, config, request, step_result


def busy() -> tuple[Roll, dict[str, Request]]:
    """`left` has ended in a step under way, `chunk` has a part of its prompt in it, `edge` has filled its
    block, `pair:1` is held, and `new` waits."""
    world = World(config(max_num_seqs=4, max_num_batched_tokens=12, long_prefill_token_threshold=6), 16)
    world.add(request("edge", 4))
    world.step()
    world.add(request("left", [1, 2]))
    world.add(request("chunk", [5] * 9))
    world.add(request("pair", [6] * 9, n=2))
    world.add(request("new", [7] * 3))
    world.scheduler.schedule(2.0)
    world.abort("left")
    roll = world.scheduler._roll
    roll.check()
    everybody = dict(roll.requests)
    assert everybody["left"].state is State.FINISHED
    assert everybody["pair:1"].state is State.HELD
    assert everybody["new"].state is State.WAITING
    assert everybody["chunk"].inflight == 1
    return roll, everybody


BREAKS: dict[str, Callable[[Roll, dict[str, Request]], object]] = {
    "a block of nobody": lambda roll, who: who["chunk"].blocks.append(15),
    "a count of the queue": lambda roll, who: setattr(roll.queue, "fresh", 7),
    "an end of nobody": lambda roll, who: roll._endings.update(nobody=roll._endings["left"]),
    "a weight of the queue": lambda roll, who: setattr(roll.queue, "prompt_tokens", 7),
    "another weight of the queue": lambda roll, who: setattr(roll.queue, "max_tokens", 7),
    "running out of order": lambda roll, who: roll.running.reverse(),
    "an end of somebody who has not ended": lambda roll, who: roll._endings.update(
        new=roll._endings.pop("left")
    ),
    "ended without a step under way": lambda roll, who: setattr(who["left"], "inflight", 0),
    "computed less than nothing": lambda roll, who: setattr(who["new"], "computed", -1),
    "computed more than there is": lambda roll, who: setattr(who["chunk"], "computed", 10),
    "pending less than nothing": lambda roll, who: setattr(who["chunk"], "pending", -1),
    "pending without a step under way": lambda roll, who: setattr(who["new"], "pending", 1),
    "pending more than it may generate": lambda roll, who: setattr(who["chunk"], "pending", 9),
    "computed more than its blocks hold": lambda roll, who: setattr(who["edge"], "computed", 9),
    "runs and is not among the running": lambda roll, who: roll.running.__setitem__(0, copy(who["edge"])),
    "blocks of one that does not run": lambda roll, who: who["pair:1"].blocks.append(0),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_check_sees_what_is_broken(broken: str) -> None:
    roll, everybody = busy()
    if broken == "computed more than its blocks hold":
        everybody["edge"].pending = 6
    BREAKS[broken](roll, everybody)
    with pytest.raises(AssertionError):
        roll.check()


def test_the_last_event_has_all_figures() -> None:
    """Of one that found a prefix, was preempted, and was aborted in a step under way."""
    world = World(config(watermark=0.0), num_blocks=5)
    world.add(request("before", [9] * 9, max_tokens=1))
    world.run()
    world.add(request("old", [1], max_tokens=16))
    world.add(request("young", [9] * 9, max_tokens=8))
    while not world.scheduler.totals.preemptions:
        world.step()
    waiting = world.scheduler._roll.requests["young"]
    assert (waiting.state, waiting.cached, waiting.preemptions) == (State.WAITING, 8, 1)
    assert waiting.scheduled_at == 2.0
    world.abort("young")
    last = world.events[-1]
    assert last == Event(
        "young",
        finish=FinishReason.ABORT,
        at=world.now,
        scheduled_at=2.0,
        cached=8,
        device_seconds=waiting.device_seconds,
        preemptions=1,
    )
    assert last.device_seconds > 0


def test_one_that_never_ran_has_no_figures() -> None:
    world = World(config())
    world.add(request("a", [1]))
    world.abort("a")
    assert world.events == [Event("a", finish=FinishReason.ABORT, at=0.0)]
    assert world.events[0].cached == 0


def test_each_event_says_how_things_stand() -> None:
    world = World(config(), num_blocks=32)
    world.add(request("before", 13, max_tokens=2))
    world.run()
    assert [event.cached for event in world.events] == [0, 0]
    world.events.clear()
    world.add(request("a", 13, max_tokens=2))
    world.run()
    first, last = world.events
    assert (first.finish, last.finish) == (None, FinishReason.LENGTH)
    assert (first.at, last.at) == (3.0, 4.0)
    assert first.scheduled_at == last.scheduled_at == 3.0
    assert first.cached == last.cached == 12
    assert first.device_seconds == pytest.approx(0.5)
    assert last.device_seconds == pytest.approx(1.0)


def test_tenants_are_known_as_long_as_they_have_requests() -> None:
    world = World(config(), num_blocks=32, policy=Fair())
    served = world.scheduler._roll.view.served
    world.add(request("a", [1], max_tokens=1, tenant="one"))
    world.add(request("b", [2], max_tokens=3, tenant="one"))
    assert served == {"one": 0.0}
    world.step()
    assert served == {"one": pytest.approx(0.5)}
    world.add(request("c", [3], max_tokens=9, tenant="two"))
    assert served["two"] == served["one"]
    world.step()
    world.step()
    assert set(served) == {"two"}
    world.step()
    world.add(request("d", [4], max_tokens=9, tenant="three"))
    assert served["three"] == served["two"]
    world.step()
    world.step()
    assert served["three"] < served["two"]
    world.add(request("e", [5], max_tokens=9, tenant="four"))
    assert served["four"] == served["three"]  # as the one who has had least
    for name in "de":
        world.abort(name)
    assert set(served) == {"two"}
    world.abort("c")
    assert not served
    assert not world.scheduler._roll._tenants


def test_nothing_is_kept_of_tenants_where_no_policy_asks() -> None:
    world = World(config())
    world.add(request("a", [1], tenant="one"))
    world.step()
    world.abort("a")
    assert not world.scheduler._roll.view.served
    assert not world.scheduler._roll._tenants


def test_who_has_ended_has_nothing_pending() -> None:
    world = World(config())
    world.add(request("a", [1]))
    plan = world.scheduler.schedule(1.0)
    one = world.scheduler._roll.requests["a"]
    assert one.pending == 1
    world.abort("a")
    assert (one.pending, one.state, world.scheduler.has_work) == (0, State.FINISHED, True)
    world.scheduler.commit(plan, step_result(plan, [1]), 2.0)
    assert not world.scheduler.has_work


def test_everybody_who_is_here_at_a_reset_gets_a_last_event() -> None:
    world = World(config(max_num_seqs=1), num_blocks=32)
    world.add(request("runs", [1]))
    world.add(request("waits", [2]))
    world.step()
    world.scheduler.schedule(1.0)
    world.abort("waits")
    assert world.events.pop().request == "waits"
    world.add(request("leaves", [3]))
    one = world.scheduler._roll.requests["runs"]
    events = world.scheduler.reset()
    spent = one.device_seconds
    assert events == [
        Event("runs", finish=FinishReason.ABORT, at=1.0, scheduled_at=1.0, device_seconds=spent),
        Event("leaves", finish=FinishReason.ABORT, at=1.0),
    ]
    assert one.device_seconds == pytest.approx(0.5)
    assert not world.scheduler.has_work


def test_logprobs_of_a_prompt_come_with_the_first_token_only() -> None:
    world = World(config())
    world.add(request("a", 20, max_tokens=2, sampling=Sampling(prompt_logprobs=0)))
    world.run()
    first, last = world.events
    assert first.prompt_logprobs is not None
    assert [each.token for each in first.prompt_logprobs] == list(range(1001, 1020))
    assert last.prompt_logprobs is None
