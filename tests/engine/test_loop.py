"""EngineLoop: faults stay with their request, time is accounted for, refusals say when to come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.blocks import BlockPool
from penstock.core.errors import StartupError
from penstock.core.executor import Capacity, Executor, Ticket
from penstock.core.plan import Event, StepResult
from penstock.core.request_spec import FinishReason
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Abort, Add
from penstock.engine.replay import replay
from penstock.engine.trace import StepLog, open_log, read_log
from tests.engine.fake import FakeExecutor, VirtualClock, add, spec


def make_loop(
    executor: Executor | None = None,
    heartbeat: Heartbeat | None = None,
    log: Path | None = None,
    seed: int | None = None,
    depth: int = 1,
    **limits: object,
) -> EngineLoop:
    executor = executor or FakeExecutor()
    config = SchedulerConfig(
        **{"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, **limits}  # type: ignore[arg-type]
    )
    capacity = executor.capacity()
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    scheduler = Scheduler(config, pool, features=capacity.features)
    steps = StepLog(config, capacity, file=open_log(str(log))) if log else None
    clock = executor.clock if isinstance(executor, FakeExecutor) else VirtualClock(100.0)
    return EngineLoop(scheduler, executor, clock, steps, heartbeat, seed=seed, depth=depth)


def cause(event: Event) -> str:
    """Why it failed."""
    assert event.failure is not None
    return event.failure.cause


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
    assert cause(last["bad"]) == "RuntimeError: kernel exploded"
    assert last["good"].finish is last["fine"].finish is FinishReason.LENGTH
    loop.scheduler.check()


def test_a_request_that_breaks_a_step_of_its_own_fails_too() -> None:
    loop = make_loop(FakeExecutor(failing={"bad": ValueError()}))
    loop.handle(add("bad"))
    assert [cause(event) for event in run(loop)] == ["ValueError"]


def test_a_broken_device_ends_the_loop_and_a_bad_request_does_not() -> None:
    """When nobody gets through, the probe tells the two apart."""
    broken: list[str] = []

    def probe() -> None:
        if broken:
            raise RuntimeError("illegal memory access")

    loop = make_loop(FakeExecutor(failing={"bad": RuntimeError("no such kernel")}, probe=probe))
    for _ in range(5):
        loop.handle(add("bad"))
        assert [cause(event) for event in run(loop)] == ["RuntimeError: no such kernel"]
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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["schedule", "submit", "collect", "commit"])
def test_wherever_an_interruption_comes_the_engine_goes_on(tmp_path: Path, where: str, depth: int) -> None:
    """Ctrl-C in LLM.generate: what was half done is forgotten as a whole."""
    path = tmp_path / "steps.jsonl"
    executor = FakeExecutor()
    loop = make_loop(executor, log=path, depth=depth)
    for name in "ab":
        loop.handle(add(name, range(13), max_tokens=9, n=2))
    for _ in range(3):
        loop.step()
    owner = loop.scheduler if where in ("schedule", "commit") else executor
    original = getattr(owner, where)

    def interrupted(*args: object) -> object:
        original(*args)
        setattr(owner, where, original)
        raise KeyboardInterrupt

    setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    assert not loop.has_work
    loop.scheduler.check()
    for name in "ac":
        loop.handle(add(name, range(13)))
    events = run(loop)
    assert {event.request: event.finish for event in events if event.finish} == dict.fromkeys(
        "ac", FinishReason.LENGTH
    )
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(path.read_text().splitlines())
    assert recorded == replayed
    assert len(recorded) > 3


def test_an_id_in_use_is_refused_without_a_word_to_whoever_has_it() -> None:
    loop = make_loop()
    loop.handle(add("x:0"))
    refused = loop.handle(add("x", n=2))
    assert [(event.request, cause(event)) for event in refused] == [
        ("x:1", "request id 'x:0' is already in use.")
    ]
    assert [event.finish for event in run(loop) if event.request == "x:0"][-1] is FinishReason.LENGTH


def test_refusals_replay(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"

    class Plain(FakeExecutor):
        def capacity(self) -> Capacity:
            return replace(super().capacity(), features=frozenset())

    loop = make_loop(Plain(), log=path)
    loop.handle(Add(replace(spec("a"), adapter="lora")))
    loop.handle(add("b"))
    run(loop)
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(path.read_text().splitlines())
    assert recorded == replayed


def test_requests_without_a_seed_get_one_that_they_keep() -> None:
    plans = []
    for _ in range(2):
        loop = make_loop(seed=7)
        loop.handle(add("a"))
        loop.handle(add("b"))
        loop.handle(add("c", (1,), 1, temperature=0.0))
        loop.step()
        plans.append({entry.request: entry.spec.seed_of(entry.index) for entry in loop.last_plan.admitted})
    assert plans[0] == plans[1]
    assert len(set(plans[0].values())) == 3
    assert plans[0]["c"] is None


def test_nothing_is_drawn_for_who_brings_a_seed_or_needs_none() -> None:
    loop = make_loop(seed=7)
    loop.handle(add("own", seed=5))
    loop.handle(add("greedy", temperature=0.0))
    loop.handle(add("drawn"))
    loop.step()
    admitted = {entry.request: entry.spec.drawn_seed for entry in loop.last_plan.admitted}
    assert (admitted["own"], admitted["greedy"]) == (None, None)
    assert admitted["drawn"] is not None
    again = make_loop(seed=7)
    again.handle(add("drawn"))
    again.step()
    assert again.last_plan.admitted[0].spec.drawn_seed == admitted["drawn"]


def test_what_the_scheduler_refuses_becomes_an_event() -> None:
    loop = make_loop()
    events = loop.handle(add("long", range(70), n=2))
    assert [(event.request, event.finish) for event in events] == [
        ("long:0", FinishReason.ERROR),
        ("long:1", FinishReason.ERROR),
    ]
    failure = events[0].failure
    assert failure is not None
    assert (failure.type, failure.param) == ("ContextLengthExceeded", "max_tokens")
    assert "prompt (70 tokens)" in failure.cause
    assert not loop.has_work


def test_what_the_executor_cannot_do_is_refused_by_name() -> None:
    class Plain(FakeExecutor):
        def capacity(self) -> Capacity:
            return replace(super().capacity(), features=frozenset())

    loop = make_loop(Plain())
    wanted = replace(spec("a"), adapter="lora", grammar="json")
    (event,) = loop.handle(Add(wanted))
    assert event.failure is not None
    assert (event.failure.type, event.failure.param) == ("UnsupportedParameter", "adapter")
    assert "adapter, grammar" in event.failure.cause
    assert not loop.has_work


def test_a_full_queue_says_when_to_come_back() -> None:
    loop = make_loop(max_num_seqs=1, max_num_queued_reqs=1)
    for name in "abc":
        loop.handle(add(name))
    ((name, failure),) = [(event.request, event.failure) for event in run(loop) if event.failure]
    assert name == "c"
    assert (failure.type, failure.param) == ("QueueFull", "max_num_queued_reqs")
    assert failure.retry_after is not None
    assert failure.retry_after >= 1


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


def test_statistics_are_totals() -> None:
    loop = make_loop()
    loop.handle(add("a", range(10)))
    loop.handle(add("b", range(10)))
    loop.step()
    stats = loop.stats()
    totals = stats.totals
    assert (stats.running, stats.waiting, totals.generation_tokens, totals.steps) == (2, 0, 2, 1)
    assert (totals.prompt_tokens, totals.cached_tokens) == (12, 8)
    assert (totals.prefix_queries, totals.prefix_hits) == (20, 8)
    assert stats.seconds > 0
    loop.step()
    assert (totals.generation_tokens, totals.steps) == (2, 1)  # what was told does not change
    run(loop)
    again = loop.stats()
    assert (again.totals.prompt_tokens, again.totals.generation_tokens) == (12, 6)
    assert loop.stats().seconds == 0.0


def test_statistics_say_how_things_stand() -> None:
    loop = make_loop(max_num_seqs=1)
    first = loop.stats()
    assert (first.seconds, first.predicted, first.waiting, first.deferred) == (0.0, 0.0, 0, 0)
    loop.handle(add("a", range(10), n=2))
    loop.handle(add("b", range(10)))
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.deferred) == (0, 3, 1)
    loop.step()
    stats = loop.stats()
    assert (stats.running, stats.waiting) == (1, 2)


def test_an_idle_loop_writes_no_plans(tmp_path: Path) -> None:
    log = tmp_path / "log"
    loop = make_loop(log=log)
    loop.handle(add("a", max_tokens=1))
    run(loop)
    assert loop._log is not None
    for _ in range(3):
        assert loop.step() == []
    loop._log.close()
    assert sum('"items"' in line for line in log.read_text().splitlines()) == 1


def test_a_refusal_is_written_though_nothing_is_planned(tmp_path: Path) -> None:
    log = tmp_path / "log"
    loop = make_loop(FakeExecutor(num_blocks=4), log=log, max_num_seqs=1, max_num_queued_reqs=1, depth=2)
    for name in "abc":
        loop.handle(add(name))
    refused = [event for event in run(loop) if event.failure]
    assert [event.request for event in refused] == ["c"]
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(log.read_text().splitlines())
    assert recorded == replayed


def test_a_prediction_belongs_to_the_step_that_is_told(tmp_path: Path) -> None:
    """With two steps in flight a long prompt must not be judged by the decode behind it."""
    page = Heartbeat(tmp_path / "page", create=True)
    loop = make_loop(heartbeat=Heartbeat(tmp_path / "page"), depth=2)
    loop.handle(add("a", range(16), max_tokens=4))
    told, shown = [], []
    while loop.has_work:
        loop.step()
        stats = loop.stats()
        told.append((stats.seconds, stats.predicted))
        shown.append(page.read()[2])
    assert all(predicted == pytest.approx(seconds, rel=0.2) for seconds, predicted in told)
    assert told[0][1] > 2 * told[1][1]
    assert shown[:-1] == [predicted for _, predicted in told[1:]]  # the oldest that is still under way
    assert shown[-1] == 0.0


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
@given(histories, st.sampled_from(["fcfs", "priority"]), st.integers(1, 2))
def test_a_recorded_run_replays_to_identical_plans(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, ...]], policy: str, depth: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "steps.jsonl"
    loop = make_loop(
        FakeExecutor(num_blocks=12, failing={"r3": RuntimeError("planned")}),
        log=path,
        policy=policy,
        depth=depth,
        watermark=0.0,
        max_num_queued_reqs=3,
    )
    names: list[str] = []
    for what, *args in history:
        if what == "add":
            number = len(names)
            new = add(
                f"r{number}",
                [number // 3 + i for i in range(args[0])],  # type: ignore[call-overload]
                args[1],  # type: ignore[arg-type]
                priority=number % 3,
                n=1 + number % 4 // 3,
            )
            names += new.spec.ids
            loop.handle(new)
        elif what == "abort" and names:
            loop.handle(Abort((names[args[0] % len(names)],)))  # type: ignore[operator]
        elif what == "step":
            for _ in range(args[0]):  # type: ignore[call-overload]
                loop.step()
    run(loop)
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay(path.read_text().splitlines())
    assert sum('"items":[]' not in line for line in recorded) == loop.scheduler.totals.steps
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
    assert late[2:] == lines[-513:-1]  # the last line is the end
    with pytest.raises(ValueError, match="begins in mid-run"):
        read_log(late)
    with pytest.raises(ValueError, match="not the head"):
        read_log(["{}"])


def test_the_ring_is_bounded_in_tokens_of_prompts() -> None:
    """256 prompts of 32k tokens would be 300 MB that no memory table knows of."""
    loop = make_loop(FakeExecutor(num_blocks=10_000), max_model_len=32_768, max_num_batched_tokens=40_000)
    log = loop._log = StepLog(loop.scheduler.config, loop.executor.capacity())
    for number in range(40):
        loop.handle(add(str(number), range(30_000), max_tokens=1))
        run(loop)
    kept = [prompt for entry in log._ring if entry.kind == "in" for prompt in entry.content.spec.prompts]
    assert 0 < sum(len(prompt.token_ids) for prompt in kept) <= 1 << 19
    plans = [entry.content for entry in log._ring if entry.kind == "plan"]
    assert not any(admission.spec.prompts for plan in plans for admission in plan.admitted)


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
