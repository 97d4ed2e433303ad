"""Policies and what a policy is given: the order of requests, of the queue, and of those who yield."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.core.policy import POLICIES, Fcfs, Priority, View, create_policy
from penstock.core.queue import Queue
from penstock.core.request import Request, State
from penstock.core.request_spec import ServiceClass

from .world import request

BACKGROUND, REALTIME = ServiceClass.BACKGROUND, ServiceClass.REALTIME


def arrived(*priorities: int) -> list[Request]:
    made = []
    for number, priority in enumerate(priorities):
        (one,) = Request.of(request(f"r{number}", 3, priority=priority))
        one.arrival = number
        made.append(one)
    return made


def test_policies_by_name() -> None:
    assert [create_policy(name).name for name in POLICIES] == ["fcfs", "priority"]
    assert (create_policy("fcfs"), create_policy("priority")) == (Fcfs(), Priority())
    assert not create_policy("fcfs").dynamic
    with pytest.raises(ValueError, match="unknown scheduling policy 'fair'; choose from fcfs, priority"):
        create_policy("fair")


def test_who_goes_first_and_who_yields() -> None:
    assert View() == View(0.0, {})
    requests = arrived(3, -1, 3)
    assert [Fcfs().order(each, View()) for each in requests] == [(False, 0), (False, 1), (False, 2)]
    assert [Priority().order(each, View()) for each in requests] == [
        (False, 3, 0),
        (False, -1, 1),
        (False, 3, 2),
    ]
    assert Fcfs().victim(requests, View()) is requests[2]
    assert Priority().victim(requests[:2], View()) is requests[1]


def test_what_nobody_waits_for_is_served_after_all_others_and_yields_before_them() -> None:
    requests = []
    for number, (service_class, priority) in enumerate(
        ((BACKGROUND, -9), (REALTIME, 5), (BACKGROUND, 0), (REALTIME, 0))
    ):
        (one,) = Request.of(request(f"r{number}", 3, service_class=service_class, priority=priority))
        one.arrival = number
        requests.append(one)
    ordered = sorted(requests, key=lambda each: Priority().order(each, View()))
    assert [each.id for each in ordered] == ["r3", "r1", "r0", "r2"]
    assert Priority().victim(ordered, View()).id == "r2"
    assert [each.id for each in sorted(requests, key=lambda each: Fcfs().order(each, View()))] == [
        "r1",
        "r3",
        "r0",
        "r2",
    ]


def queue_of(*prompts: int, siblings: int = 1) -> tuple[Queue, list[Request]]:
    queue, everybody = Queue(), []
    for number, length in enumerate(prompts):
        for one in Request.of(request(f"r{number}", length, n=siblings)):
            one.rank = (len(everybody),)
            everybody.append(one)
            queue.add(one)
            queue.check()
    return queue, everybody


def test_the_queue_counts_who_is_bounded() -> None:
    queue, everybody = queue_of(3, 4, siblings=3)
    assert (len(queue), queue.held, queue.fresh, queue.fresh_tokens) == (2, 4, 2, 7)
    assert [queue[0].id, queue[1].id] == ["r0:0", "r1:0"]
    assert queue.take(1).id == "r1:0"
    assert (len(queue), queue.held, queue.fresh, queue.fresh_tokens) == (1, 4, 1, 3)
    queue.release(everybody[3])
    assert (len(queue), queue.held, queue.fresh, queue.fresh_tokens) == (3, 2, 1, 3)
    assert not everybody[3].followers
    assert {each.state for each in everybody[3:]} == {State.WAITING}
    queue.remove(everybody[1])  # held
    assert everybody[0].followers == [everybody[2]]
    queue.remove(everybody[4])  # waiting
    assert (len(queue), queue.held) == (2, 1)
    queue.check()


def test_the_queue_weighs_everybody_in_it() -> None:
    queue, everybody = queue_of(3, 4, siblings=2)
    assert (queue.prompt_tokens, queue.max_tokens) == (14, 32)
    queue.take(0)
    assert (queue.prompt_tokens, queue.max_tokens) == (11, 24)
    queue.release(everybody[0])
    assert (queue.prompt_tokens, queue.max_tokens) == (11, 24)
    queue.remove(everybody[3])
    assert (queue.prompt_tokens, queue.max_tokens) == (7, 16)
    queue.overflow(0, None)
    assert (queue.prompt_tokens, queue.max_tokens) == (3, 8)
    queue, _ = queue_of(3, 4, siblings=3)
    queue.overflow(1, None)
    assert (queue.prompt_tokens, queue.max_tokens) == (9, 24)


def test_who_was_here_before_is_not_bounded() -> None:
    queue, (one, other) = queue_of(3, 4)
    queue.take(0)
    one.cached, one.state = 0, State.RUNNING
    queue.add(one)
    assert one.state is State.WAITING
    assert (len(queue), queue.fresh, queue.fresh_tokens) == (2, 1, 4)
    assert [each.id for each, _ in queue.overflow(0, None)] == [other.id]
    assert [queue[0].id, len(queue), queue.fresh, queue.fresh_tokens] == [one.id, 1, 0, 0]
    assert queue.overflow(0, 0) == []


def test_who_was_here_before_is_passed_over_wherever_he_stands() -> None:
    queue, (one, other) = queue_of(3, 4)
    assert queue.take(1) is other
    other.cached = 0
    queue.add(other)
    assert queue.overflow(0, None) == [(one, "max_num_queued_reqs")]
    assert (len(queue), queue[0]) == (1, other)


def _blocks(queue: Queue) -> None:
    queue[0].blocks = [1]


def _state(queue: Queue) -> None:
    queue[1].state = State.RUNNING


def _order(queue: Queue) -> None:
    queue[0].rank = (9,)


def _count(queue: Queue) -> None:
    queue.fresh += 1


def _tokens(queue: Queue) -> None:
    queue.fresh_tokens -= 1


@pytest.mark.parametrize("break_", [_blocks, _state, _order, _count, _tokens])
def test_the_check_sees_what_is_broken(break_: Callable[[Queue], None]) -> None:
    queue, _ = queue_of(3, 4)
    queue.check()
    break_(queue)
    with pytest.raises(AssertionError):
        queue.check()


@pytest.mark.parametrize(
    ("most", "most_tokens", "refused"),
    [
        (None, None, []),
        (3, None, []),
        (2, None, [("r2", "max_num_queued_reqs")]),
        (None, 12, []),
        (None, 11, [("r2", "max_num_queued_tokens")]),
        (None, 3, [("r2", "max_num_queued_tokens"), ("r1", "max_num_queued_tokens")]),
        (2, 3, [("r2", "max_num_queued_reqs"), ("r1", "max_num_queued_tokens")]),
        (0, 0, [("r2", "max_num_queued_reqs"), ("r1", "max_num_queued_reqs"), ("r0", "max_num_queued_reqs")]),
    ],
)
def test_the_last_are_refused_until_both_bounds_hold(
    most: int | None, most_tokens: int | None, refused: list[tuple[str, str]]
) -> None:
    queue, _ = queue_of(3, 4, 5)
    assert [(each.id, bound) for each, bound in queue.overflow(most, most_tokens)] == refused
    assert len(queue) == queue.fresh == 3 - len(refused)
    queue.check()


def test_followers_are_refused_with_their_leader() -> None:
    queue, everybody = queue_of(3, 4, siblings=3)
    refused = queue.overflow(1, None)
    assert [each for each, _ in refused] == everybody[3:]
    assert {bound for _, bound in refused} == {"max_num_queued_reqs"}
    assert (len(queue), queue.held) == (1, 2)
    assert not everybody[3].followers


def test_new_keys_make_a_new_order() -> None:
    queue, (one, other) = queue_of(3, 4)
    queue.sort(lambda each: (-each.prompt_len,))
    assert [queue[0], queue[1]] == [other, one]
    assert (one.rank, other.rank) == ((-3,), (-4,))
