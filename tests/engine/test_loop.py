"""EngineLoop: faults stay with their request, time is accounted for, refusals say when to come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.blocks import BlockPool
from penstock.core.errors import StartupError
from penstock.core.plan import Event, StepResult
from penstock.core.request import FinishReason
from penstock.core.sampling_params import SamplingParams
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.engine.clock import VirtualClock
from penstock.engine.executor.base import Ticket
from penstock.engine.executor.simulated import FakeExecutor
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Abort, Add
from penstock.engine.trace import StepLog, open_log, read_log, replay


def add(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 3, **fields: object) -> Add:
    params = SamplingParams(max_tokens=max_tokens)
    return Add(name, tuple(prompt), params, max_tokens, arrived_at=0.0, **fields)  # type: ignore[arg-type]


def make_loop(
    executor: FakeExecutor | None = None,
    heartbeat: Heartbeat | None = None,
    log: Path | None = None,
    seed: int | None = None,
    probe: Callable[[], None] | None = None,
    **limits: object,
) -> EngineLoop:
    executor = executor or FakeExecutor()
    config = SchedulerConfig(
        **{"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, **limits}  # type: ignore[arg-type]
    )
    capacity = executor.capacity()
    scheduler = Scheduler(config, BlockPool(capacity.num_blocks, capacity.block_size))
    steps = StepLog(config, capacity, file=open_log(str(log))) if log else None
    return EngineLoop(scheduler, executor, VirtualClock(100.0), steps, heartbeat, seed=seed, probe=probe)


def run(loop: EngineLoop) -> list[Event]:
    events: list[Event] = []
    while loop.has_work:
        events += loop.step()
    return events


def test_a_request_that_breaks_the_step_fails_alone_and_says_why() -> None:
    loop = make_loop(FakeExecutor(failing={"bad": RuntimeError("kernel exploded")}))
    for name in ("good", "bad", "fine"):
        loop.handle(add(name, (ord(name[0]), 5)))
    last = {event.request: event for event in run(loop)}
    assert last["bad"].finish is FinishReason.ERROR
    assert last["bad"].error == "RuntimeError: kernel exploded"
    assert last["good"].finish is last["fine"].finish is FinishReason.LENGTH
    loop.scheduler.check()


def test_a_request_that_breaks_a_step_of_its_own_fails_too() -> None:
    loop = make_loop(FakeExecutor(failing={"bad": ValueError()}))
    loop.handle(add("bad"))
    assert [event.error for event in run(loop)] == ["ValueError"]


def test_a_broken_device_ends_the_loop_and_a_bad_request_does_not() -> None:
    """When nobody gets through, the probe tells the two apart."""
    executor = FakeExecutor(failing={"bad": RuntimeError("no such kernel")})
    broken: list[str] = []

    def probe() -> None:
        if broken:
            raise RuntimeError("illegal memory access")

    loop = make_loop(executor, probe=probe)
    for _ in range(5):
        loop.handle(add("bad"))
        assert [event.error for event in run(loop)] == ["RuntimeError: no such kernel"]
    broken.append("now")
    loop.handle(add("bad"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        loop.step()
    loop.scheduler.check()


def test_an_interrupted_step_leaves_no_promises_behind() -> None:
    """Blocks are found by others as soon as they are planned: after Ctrl-C they hold nothing."""

    class Interrupted(FakeExecutor):
        interrupt = True

        def collect(self, ticket: Ticket) -> StepResult:
            if self.interrupt:
                raise KeyboardInterrupt
            return super().collect(ticket)

    executor = Interrupted()
    loop = make_loop(executor)
    loop.handle(add("a", range(13)))
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    assert not loop.has_work
    executor.interrupt = False
    loop.handle(add("b", range(13)))
    assert {event.cached for event in run(loop)} == {0}


def test_requests_without_a_seed_get_one_that_they_keep() -> None:
    plans = []
    for _ in range(2):
        loop = make_loop(seed=7)
        loop.handle(add("a"))
        loop.handle(add("b"))
        loop.handle(Add("c", (1,), SamplingParams(temperature=0.0), 1, arrived_at=0.0))
        loop.step()
        plans.append({entry.request: entry.params.seed for entry in loop.last_plan.admitted})
    assert plans[0] == plans[1]
    assert len(set(plans[0].values())) == 3
    assert plans[0]["c"] is None


def test_what_the_scheduler_refuses_becomes_an_event() -> None:
    loop = make_loop()
    events = loop.handle(add("long", range(70)))
    assert [(event.finish, event.error_type) for event in events] == [
        (FinishReason.ERROR, "ContextLengthExceeded")
    ]
    assert "max_tokens" in (events[0].error or "")


def test_a_full_queue_says_when_to_come_back() -> None:
    loop = make_loop(max_num_seqs=1, max_num_queued_reqs=1)
    for name in "abc":
        loop.handle(add(name))
    refused = [event for event in run(loop) if event.error_type == "QueueFull"]
    assert [event.request for event in refused] == ["c"]
    assert refused[0].retry_after is not None
    assert refused[0].retry_after >= 1


def test_an_abort_answers_with_the_final_bill() -> None:
    loop = make_loop()
    loop.handle(add("a", max_tokens=30))
    loop.step()
    (event,) = loop.handle(Abort(("a", "unknown")))
    assert event.finish is FinishReason.ABORT
    assert event.device_seconds > 0
    assert not loop.has_work


def test_every_device_second_is_a_requests_or_idle() -> None:
    loop = make_loop()
    clock = loop._clock
    for name in "abc":
        loop.handle(add(name, range(20), max_tokens=9))
    events = run(loop)
    clock.spent(0.7)  # an idle while
    loop.handle(add("d"))
    events += run(loop)
    bills = sum(event.device_seconds for event in events if event.finish)
    now = clock.now()
    assert bills + loop.meter.idle(now) == pytest.approx(now - 100.0)
    assert loop.stats().idle == pytest.approx(0.7)


def test_statistics_are_of_the_steps_since_the_last_call() -> None:
    loop = make_loop()
    loop.handle(add("a", range(10)))
    loop.handle(add("b", range(10)))
    loop.step()
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.generation_tokens) == (2, 0, 2)
    assert (stats.prompt_tokens, stats.cached_tokens) == (12, 8)
    assert (stats.prefix_queries, stats.prefix_hits) == (20, 8)
    assert stats.seconds > 0
    again = loop.stats()
    assert (again.prompt_tokens, again.generation_tokens, again.seconds) == (0, 0, 0.0)


def test_the_heartbeat_shows_progress(tmp_path: Path) -> None:
    page = Heartbeat(tmp_path / "page", create=True)
    loop = make_loop(heartbeat=Heartbeat(tmp_path / "page"))
    assert page.read() == (0.0, 0.0, 0.0, 0.0)
    loop.handle(add("a", max_tokens=2))
    run(loop)
    progress, began, predicted, steps = page.read()
    assert progress == pytest.approx(loop._clock.now())
    assert (began, predicted, steps) == (0.0, 0.0, 2.0)
    page.begin(5.0, 0.25)
    assert page.read() == (5.0, 5.0, 0.25, 2.0)


histories = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 9)),
        st.tuples(st.just("abort"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=50, deadline=None)
@given(histories, st.sampled_from(["fcfs", "priority"]))
def test_a_recorded_run_replays_to_identical_plans(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, ...]], policy: str
) -> None:
    path = tmp_path_factory.mktemp("log") / "steps.jsonl"
    loop = make_loop(
        FakeExecutor(num_blocks=12, failing={"r3": RuntimeError("planned")}),
        log=path,
        policy=policy,
        watermark=0.0,
    )
    names: list[str] = []
    for what, *args in history:
        if what == "add":
            names.append(f"r{len(names)}")
            base = len(names) // 3
            loop.handle(add(names[-1], [base + i for i in range(args[0])], args[1], priority=len(names) % 3))  # type: ignore[arg-type]
        elif what == "abort" and names:
            loop.handle(Abort((names[args[0] % len(names)],)))  # type: ignore[operator]
        elif what == "step":
            for _ in range(args[0]):  # type: ignore[call-overload]
                loop.step()
    run(loop)
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(path.read_text().splitlines())
    assert len(recorded) == loop.scheduler.totals.steps
    assert recorded == replayed


def test_failures_with_shared_blocks_replay(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    loop = make_loop(
        FakeExecutor(failing={"bad": RuntimeError("planned")}), log=path, max_num_batched_tokens=64
    )
    for name in ("bad", "sharer", "other"):
        loop.handle(add(name, range(13) if name != "other" else [9, 9], max_tokens=5))
    run(loop)
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(path.read_text().splitlines())
    assert len(recorded) == loop.scheduler.totals.steps
    assert recorded == replayed
    cut = path.read_text()[:-20].splitlines()  # as after a SIGKILL
    recorded, replayed = replay(cut)
    assert recorded == replayed


def test_the_ring_keeps_the_last_steps_and_says_what_is_missing(tmp_path: Path) -> None:
    loop = make_loop(log=tmp_path / "all.jsonl")
    loop.handle(add("a"))
    run(loop)
    log = loop._log
    assert log is not None
    log.dump(tmp_path / "ring.jsonl")
    for number in range(300):
        loop.handle(add(str(number), max_tokens=1))
        run(loop)
    log.dump(tmp_path / "late.jsonl")
    log.close()
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    early = (tmp_path / "ring.jsonl").read_text().splitlines()
    assert early == lines[: len(early)]
    late = (tmp_path / "late.jsonl").read_text().splitlines()
    assert late[2:] == lines[-256:]
    with pytest.raises(ValueError, match="begins in mid-run"):
        read_log(late)
    with pytest.raises(ValueError, match="not the head"):
        read_log(["{}"])


def test_a_full_disk_ends_the_log_and_nothing_else() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    loop = make_loop(log=Path("/dev/full"))
    for number in range(40):
        loop.handle(add(str(number), range(60), max_tokens=2))
    assert sum(event.finish is FinishReason.LENGTH for event in run(loop)) == 40


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--record-steps") as caught:
        open_log(str(tmp_path / "no" / "such" / "folder"))
    assert caught.value.param == "--record-steps"
