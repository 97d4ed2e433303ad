"""Who may stay, at the borders: numbers, times, and what the log says, without a socket."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from penstock.http import limits
from penstock.http.limits import RESERVE, OccasionalLog

from .test_limits import Clock, Stub, table

# ---- numbers ----


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "penstock.http"]


def busy(connections: Any, count: int, address: str = "a") -> list[Stub]:
    """So many connections with a request under way."""
    stubs = [Stub(address) for _ in range(count)]
    for stub in stubs:
        assert connections.admit(stub)
        connections.busy(stub)
    return stubs


def test_the_limit_is_reached_then_the_reserve_then_nobody_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    connections, _ = table(max_connections=3)
    ordinary = busy(connections, 3)
    assert not any(each.restricted for each in ordinary)
    assert lines(caplog) == []
    assert connections.receptive
    beyond = busy(connections, RESERVE)
    assert all(each.restricted for each in beyond)
    assert lines(caplog) == [
        "All 3 connections are busy (--max-connections): only health and metrics are answered on further "
        "ones."
    ]
    assert len(connections) == 3 + RESERVE
    assert not connections.receptive
    assert not connections.admit(Stub())
    assert lines(caplog)[1:] == ["Connections are refused unheard: the reserve is taken, too."]
    assert len(connections) == 3 + RESERVE
    # one of either kind is given back, and is one of its kind again
    connections.forget(beyond[0])
    assert connections.receptive
    [again] = busy(connections, 1)
    assert again.restricted
    connections.forget(ordinary[0])
    assert connections.receptive
    [again] = busy(connections, 1)
    assert not again.restricted


def test_a_client_beyond_its_share_is_restricted_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    connections, _ = table(max_connections=10, max_connections_per_client=2)
    own = busy(connections, 2)
    assert not any(each.restricted for each in own)
    [third] = busy(connections, 1)
    assert third.restricted
    assert lines(caplog) == [
        "a has 2 connections (--max-connections-per-client): it gets 503 on further ones."
    ]
    [other] = busy(connections, 1, "b")
    assert not other.restricted
    # those that are restricted count for the client, too
    connections.forget(own[0])
    assert busy(connections, 1)[0].restricted
    connections.forget(third)
    connections.forget(own[1])
    assert not busy(connections, 1)[0].restricted


def test_without_a_share_a_client_may_have_all() -> None:
    connections, _ = table(max_connections=5)
    assert not any(each.restricted for each in busy(connections, 5))


# ---- who makes room ----


def test_the_longest_idle_goes_first_and_nobody_who_has_just_come(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_HEARING", 0.25)
    connections, clock = table(max_connections=2)
    first, second = Stub(), Stub()
    for each in (first, second):
        connections.admit(each)
        clock.now += 1.0
    connections.idle(first)  # who has been idle for long does not become younger by another word
    new = Stub()
    connections.admit(new)
    assert (first.is_cut, second.is_cut, new.restricted) == (True, False, False)
    assert lines(caplog) == [
        "There are 2 connections (--max-connections): the longest idle one is closed for a new one."
    ]
    connections.busy(second)
    clock.now += 0.125
    late = Stub()
    connections.admit(late)
    assert (new.is_cut, late.restricted) == (False, True), "it has not been heard yet"
    clock.now += 0.125
    later = Stub()
    connections.admit(later)
    assert (new.is_cut, later.restricted) == (True, False)


def test_in_the_reserve_the_silent_make_room_as_well(caplog: pytest.LogCaptureFixture) -> None:
    connections, clock = table(max_connections=1)
    busy(connections, 1)
    reserve = busy(connections, RESERVE)
    assert not connections.receptive
    connections.idle(reserve[5], awaited=False)
    assert not connections.receptive, "it has just become idle"
    clock.now += 1.0
    assert connections.receptive
    new = Stub()
    assert connections.admit(new)
    assert (reserve[5].is_cut, new.restricted) == (True, True)
    assert sum(each.is_cut for each in reserve) == 1
    assert not [line for line in lines(caplog) if "longest idle" in line], "nobody's work is cut off by that"
    assert len(connections) == 1 + RESERVE


def test_an_idle_ordinary_one_is_room_for_anybody() -> None:
    connections, clock = table(max_connections=1)
    [ordinary] = busy(connections, 1)
    busy(connections, RESERVE)
    connections.idle(ordinary)
    clock.now += 1.0
    assert connections.receptive
    new = Stub()
    assert connections.admit(new)
    assert (ordinary.is_cut, new.restricted) == (True, False)


def test_each_kind_of_trouble_is_counted_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    connections, clock = table(max_connections=1, max_connections_per_client=2, timeout_send=1.0)
    for _ in range(3):  # the first one has room, each of the others takes it from the one before
        clock.now += 1.0
        assert connections.admit(Stub())
    clock.now += 1.0
    silent, *_ = busy(connections, 1)
    for number in range(RESERVE):
        busy(connections, 1, f"b{number}")
    for _ in range(2):
        assert not connections.admit(Stub("c"))
    busy_a = [Stub("a") for _ in range(2)]
    assert not any(connections.admit(stub) for stub in busy_a)
    for left in (5, 5):
        silent.left = left
        connections.sweep()
        clock.now += 1.0
        connections.sweep()
    silent.left = 0
    clock.now += 60.0
    caplog.clear()
    connections.sweep()
    told = lines(caplog)
    assert "The same (evicted) happened 2 more times." in told
    assert f"The same (full) happened {RESERVE - 1} more times." in told
    assert "The same (refused) happened 3 more times." in told
    assert any(line.startswith("The same (send) happened ") for line in told)


def test_nothing_is_kept_of_who_has_gone() -> None:
    connections, clock = table(timeout_send=10.0)
    stubs = busy(connections, 3)
    for stub in stubs:
        stub.left = 5
    connections.sweep()
    clock.now += 1.0
    connections.sweep()
    for stub in stubs:
        connections.forget(stub)
    assert (len(connections), connections._stalled, connections._of_client) == (0, {}, {})
    assert connections._idle == ({}, {})


# ---- descriptors ----


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process with these limits (soft, hard) and so many open files; its limits after that."""
    import resource

    def having(soft: int, hard: int, used: int, *, raises: bool = False) -> list[tuple[int, int]]:
        now = [(soft, hard)]

        def set_limit(kind: int, wanted: tuple[int, int]) -> None:
            if raises:
                raise ValueError("not allowed to raise maximum limit")
            now.append(wanted)

        monkeypatch.setattr(resource, "getrlimit", lambda kind: now[-1])
        monkeypatch.setattr(resource, "setrlimit", set_limit)
        monkeypatch.setattr(limits, "_in_use", lambda: used)
        return now

    return having


def test_as_many_connections_as_descriptors_are_left(files: Any, caplog: pytest.LogCaptureFixture) -> None:
    taken = 100 + limits._SPARE_DESCRIPTORS + RESERVE
    now = files(1000, 5000, 100)
    assert limits.affordable(10_000) == 5000 - taken
    assert now == [(1000, 5000), (5000, 5000)]
    assert lines(caplog) == [
        f"--max-connections 10000 is lowered to {5000 - taken}: the process may have 5000 open files "
        "(`ulimit -n`)."
    ]
    caplog.clear()
    for wanted in (5000 - taken, 8, 1):
        assert limits.affordable(wanted) == wanted
    assert lines(caplog) == []
    files(1000, 5000, 100, raises=True)
    assert limits.affordable(10_000) == 1000 - taken
    now = files(5000, 5000, 100)
    assert limits.affordable(10) == 10
    assert now == [(5000, 5000)]


def test_a_few_connections_there_must_be(files: Any) -> None:
    taken = 100 + limits._SPARE_DESCRIPTORS + RESERVE
    files(taken + 8, taken + 8, 100)
    assert limits.affordable(10_000) == 8
    files(taken + 7, taken + 7, 100)
    assert limits.affordable(7) == 7
    for wanted in (8, 10_000):
        with pytest.raises(ValueError, match=f"limit of {taken + 7} open files .* raise `ulimit -n`"):
            limits.affordable(wanted)


def test_without_a_limit_there_is_none(files: Any) -> None:
    import resource

    files(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 100)
    assert limits.affordable(10**9) == 10**9


def test_open_files_are_counted_where_the_system_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, count in (("/proc/self/fd", 3), ("/dev/fd", 5), ("nowhere", 64)):

        def listdir(path: str, there: str = there, count: int = count) -> list[str]:
            if path != there:
                raise FileNotFoundError(path)
            return ["1"] * count

        monkeypatch.setattr(limits.os, "listdir", listdir)
        assert limits._in_use() == count


# ---- times ----


def test_who_is_awaited_has_a_deadline_from_now_on() -> None:
    connections, clock = table(timeout_keep_alive=5)
    stub = Stub()
    connections.admit(stub)
    assert stub.deadline == 5.0
    clock.now = 3.0
    connections.busy(stub)
    stub.deadline = math.inf
    connections.idle(stub, awaited=False)
    assert stub.deadline == math.inf
    connections.idle(stub)
    assert stub.deadline == 8.0
    gone = Stub()
    connections.idle(gone)
    assert gone.deadline == 0.0, "nobody knows it"


def test_a_deadline_is_over_at_its_time_and_not_before() -> None:
    connections, clock = table(timeout_keep_alive=5)
    stub = Stub()
    connections.admit(stub)
    for second in range(1, 5):
        clock.now = float(second)
        connections.sweep()
    clock.now = 4.99
    connections.sweep()
    assert not stub.expired
    clock.now = 5.0
    assert connections.sweep() == connections.limits.interval == 1.0
    assert stub.expired == [5.0]


@pytest.mark.parametrize(("late", "shift"), [(0.5, 0.0), (0.6, 0.6)])
def test_time_in_which_the_loop_stood_still_is_added(late: float, shift: float) -> None:
    connections, clock = table(timeout_keep_alive=5)
    stub = Stub()
    connections.admit(stub)
    clock.now = connections.limits.interval + late
    connections.sweep()
    assert stub.deadline == pytest.approx(5.0 + shift)
    clock.now += 1.0
    connections.sweep()
    assert stub.deadline == pytest.approx(5.0 + shift), "that sweep came in time"


def test_of_thousands_some_are_sent_away_at_a_time() -> None:
    connections, clock = table(max_connections=1000, timeout_keep_alive=5)
    stubs = [Stub() for _ in range(2 * limits._AT_ONCE + 1)]
    for stub in stubs:
        connections.admit(stub)
    for second in range(1, 5):
        clock.now = float(second)
        connections.sweep()
    counts = []
    clock.now = 5.25
    for _ in range(3):
        soon = connections.sweep()
        counts.append(sum(bool(stub.expired) for stub in stubs))
        for stub in stubs:
            if stub.expired:
                stub.deadline = math.inf
        clock.now += soon
    assert counts == [limits._AT_ONCE, 2 * limits._AT_ONCE, 2 * limits._AT_ONCE + 1]
    assert soon == 1.0
    for stub in stubs[: limits._AT_ONCE]:
        stub.deadline = clock.now
    assert connections.sweep() == 1.0, "just as many as go at once"


def test_who_takes_nothing_for_the_time_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    connections, clock = table(timeout_send=10.0)
    [stub] = busy(connections, 1)
    stub.deadline = math.inf
    stub.left = 500
    for second in range(1, 11):
        clock.now = float(second)
        connections.sweep()
    assert not stub.is_cut, "ten seconds since the first look at it have not passed"
    clock.now = 11.0
    connections.sweep()
    assert stub.is_cut
    assert lines(caplog) == ["A client took nothing of its answer for 10 s (--timeout-send) and is cut off."]


def test_who_has_taken_everything_begins_anew() -> None:
    connections, clock = table(timeout_send=10.0)
    [stub] = busy(connections, 1)
    stub.deadline = math.inf
    for second in range(1, 30):
        clock.now = float(second)
        stub.left = 0 if second % 9 == 0 else 500
        connections.sweep()
    assert not stub.is_cut


# ---- the log ----


def test_a_kind_is_logged_once_a_minute_and_counted_in_between(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = OccasionalLog(clock)
    with caplog.at_level(logging.WARNING):
        log.warning("a", "first %d", 1)
        clock.now = 59.9
        log.warning("a", "second")
        log.flush()
        assert lines(caplog) == ["first 1"]
        clock.now = 60.0
        log.flush()
        assert lines(caplog)[1:] == ["The same (a) happened 1 more times."]
        log.flush()
        clock.now = 119.9
        log.warning("a", "third")  # the count was a line, too
        assert len(lines(caplog)) == 2
        clock.now = 200.0
        log.warning("a", "fourth")
        log.flush()
        assert lines(caplog)[2:] == ["fourth"]
        clock.now = 260.0
        log.flush()
        assert lines(caplog)[3:] == ["The same (a) happened 1 more times."]
