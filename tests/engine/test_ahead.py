"""Steps that are queued on a device that computes by itself (streams.py plays it): what waits and what does
not, bills by the device's clock, and what becomes of everybody when the device fails."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepCost
from penstock.core.errors import DeviceLost, DeviceOutOfMemory
from penstock.core.executor import Items
from penstock.core.plan import Event, Outcome, Plan
from penstock.core.request_spec import FinishReason
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.core.simulated import FEATURES, SimulatedExecutor
from penstock.engine.executor.ahead import Queued
from penstock.engine.executor.faults import is_lost, is_out_of_memory, lost
from penstock.engine.executor.kept import Kept
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.engine.loop import EngineLoop
from penstock.engine.replay import replay
from penstock.engine.trace import StepLog
from tests.engine.build import torch_executor
from tests.engine.fake import FakeExecutor, VirtualClock, add
from tests.engine.streams import DelayedStream
from tests.engine.test_executor_contract import PROMPT, PROMPTS, admission, drive, item, new_executor, spec


def played(stream: DelayedStream | None = None) -> tuple[TorchExecutor, DelayedStream]:
    stream = stream or DelayedStream()
    return torch_executor(32, 4, stream=stream), stream


class HostTime:
    """The clock of an engine whose device is played: host time is the stream's."""

    def __init__(self, stream: DelayedStream) -> None:
        self._stream = stream

    def now(self) -> float:
        return self._stream.now

    def spent(self, seconds: float) -> None:
        """It has passed already, while the host waited."""


LIMITS = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64)


def finish(loop: EngineLoop) -> dict[str, Event]:
    ends = {}
    for _ in range(200):
        for event in loop.step():
            if event.finish is not None:
                ends[event.request] = event
        if not loop.has_work:
            return ends
    raise AssertionError("it does not end")


@pytest.mark.parametrize("depth", [1, 2])
def test_overlapped_steps_are_billed_once(depth: int) -> None:
    """Σ shares + idle == wall, on the device's own clock: by the host's, from submission to collection, two
    steps in flight would be billed for the same seconds."""
    executor, stream = played(DelayedStream(cost=0.25))
    scheduler = Scheduler(LIMITS, BlockPool(32, 4))
    loop = EngineLoop(scheduler, executor, HostTime(stream), depth=depth)
    for name in ("a", "b"):
        loop.handle(add(name, PROMPT, 6, temperature=0.0))
    ends = finish(loop)
    stream.now += 3.0  # nothing to do
    loop.handle(add("c", PROMPT, 4, temperature=0.0))
    stream.now += 0.5  # the host is slow
    ends |= finish(loop)
    shares = sum(event.device_seconds for event in ends.values())
    assert set(ends) == {"a", "b", "c"}
    assert shares == pytest.approx(loop.meter.busy) == pytest.approx(0.25 * scheduler.totals.steps)
    assert shares + loop.meter.idle(stream.now) == pytest.approx(stream.now)
    assert loop.meter.idle(stream.now) == pytest.approx(3.5)


@pytest.mark.parametrize("depth", [1, 2])
def test_simulated_steps_that_overlap_are_billed_once(depth: int) -> None:
    executor = FakeExecutor()
    assert isinstance(executor, SimulatedExecutor)
    clock = VirtualClock()
    loop = EngineLoop(Scheduler(LIMITS, BlockPool(64, 4)), executor, clock, depth=depth)
    for name in ("a", "b"):
        loop.handle(add(name, PROMPT, 6))
    ends = finish(loop)
    clock.spent(2.0)
    loop.handle(add("c", PROMPT, 6))
    ends |= finish(loop)
    shares = sum(event.device_seconds for event in ends.values())
    assert shares + loop.meter.idle(clock.now()) == pytest.approx(clock.now())
    assert loop.meter.idle(clock.now()) == pytest.approx(2.0)


def test_the_device_never_waits_for_the_host() -> None:
    """The next step is in the queue before anybody waits for the last one; and nothing is read too early
    (DelayedStream asserts it)."""
    executor, stream = played()
    first = Plan(0, (admission("a", PROMPT),), (item("a", 0, 6, (5, 2, 7), 1),))
    tickets = [executor.submit(first)]
    tickets += [executor.submit(Plan(1, items=(item("a", 6, 1, (), 1),)))]
    assert (stream.waited, stream.fetched) == (0, 2)
    results = [executor.collect(ticket) for ticket in tickets]
    assert [result.seconds for result in results] == [1.0, 1.0]
    assert all(result.outcomes[0].tokens for result in results)


@pytest.mark.parametrize(
    "sampling", [{"logprobs": 1}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2, "temperature": 0.0}]
)
def test_what_needs_the_host_is_computed_when_all_before_it_is_settled(sampling: dict[str, object]) -> None:
    specs = [spec(name, prompt, 6, seed=3, **sampling) for name, prompt in PROMPTS.items()]  # type: ignore[arg-type]
    specs.append(spec("plain", PROMPT, 6, temperature=0.0))
    assert drive(played()[0], specs, 2)[0] == drive(new_executor("cpu"), specs, 1)[0]


def test_more_requests_than_slots() -> None:
    executor, _ = played()
    executor._ahead = type(executor._ahead)(
        executor._model, executor._cache, executor._attention, executor._stream, executor._sampler, slots=1
    )
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    assert drive(executor, specs, 2)[0] == drive(new_executor("cpu"), specs, 1)[0]


def broken_logits(executor: TorchExecutor, rows: int, when: int) -> None:
    """The model's logits are NaN in its `when`-th call, in the first so many rows, and from then on."""
    real, calls = executor._model.logits, []

    class Model:
        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            made = real(hidden).clone()
            if len(calls) >= when:
                made[:rows] = float("nan")
            return made

    model = executor._model
    executor._model = executor._ahead._model = Model()  # type: ignore[assignment]


@pytest.mark.parametrize("depth", [1, 2])
def test_numbers_that_break_fail_their_request_with_the_cause(
    depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told one step later where two are in flight; the next one, which was built on a token that is
    none, fails with it. The cause is the one that is found without steps in flight."""
    executor, _ = played()
    broken_logits(executor, 1, 3)
    specs = [spec(name, PROMPTS[name], 6, temperature=0.0) for name in ("a", "b")]
    with caplog.at_level(logging.WARNING):
        _, ends, scheduler = drive(executor, specs, depth, num_blocks=30)
    assert {event.finish for event in ends.values()} == {FinishReason.ERROR}
    for event in ends.values():
        assert event.failure is not None
        assert event.failure.cause.startswith("logits contain NaN")
        assert event.failure.tainted
    assert scheduler.pool.available == 30


def test_memory_that_runs_out_in_a_queued_step_costs_nobody_his_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The step is computed again, in parts, which fit; later ones are queued again."""
    executor, _ = played()
    queue, compute = executor._ahead.queue, executor._compute
    most = 3

    def tight_queue(items: Items, kept: list[Kept]) -> Queued:
        if sum(each.tokens for each in items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return queue(items, kept)

    def tight(items: Items) -> list[Outcome]:
        if sum(each.tokens for each in items) > most:
            raise DeviceOutOfMemory("CUDA out of memory")
        return list(compute(items))

    executor._ahead.queue = tight_queue  # type: ignore[method-assign]
    executor.recovery._compute = tight
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    with caplog.at_level(logging.INFO):
        tokens = drive(executor, specs, 2)[0]
    assert tokens == drive(new_executor("cpu"), specs, 1)[0]
    assert "could not be queued: OutOfMemoryError" in caplog.text
    assert "steps are computed in parts" in caplog.text


GONE = torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")


def test_a_device_that_is_lost_ends_the_engine_with_its_cause() -> None:
    """Wherever it is noticed: no request is tried alone, no probe is made, everybody has his last event."""
    executor, stream = played()
    scheduler = Scheduler(LIMITS, BlockPool(32, 4))
    loop = EngineLoop(scheduler, executor, HostTime(stream), depth=2)
    for name in ("a", "b"):
        loop.handle(add(name, PROMPT, 6, temperature=0.0))
    loop.step()
    stream.error = GONE
    with pytest.raises(DeviceLost, match=r"the device is lost: AcceleratorError: CUDA error: unspecified"):
        loop.step()
    ends = loop.give_up("the engine died: the device is lost")
    assert {event.request for event in ends} == {"a", "b"}
    assert all(event.failure is not None for event in ends)


@pytest.mark.parametrize("where", ["queue", "compute", "copy"])
def test_a_lost_device_is_noticed_at_every_call(where: str) -> None:
    executor, _ = played()
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise GONE

    plan = Plan(0, (admission("a", PROMPT),), (item("a", 0, 6, (5, 2), 1),))
    if where == "queue":
        executor._ahead.queue = broken  # type: ignore[assignment]
    elif where == "compute":
        executor._forward = broken  # type: ignore[assignment]
        asked = replace(plan.admitted[0].spec, sampling=spec("a", logprobs=1).sampling)
        plan = replace(plan, admitted=(replace(plan.admitted[0], spec=asked),))
    else:
        executor = torch_executor(32, 4, stream=DelayedStream(), host_blocks=4)
        assert executor._host is not None
        executor._host.store = broken  # type: ignore[method-assign, assignment]
        plan = replace(plan, swap_out=((1, 0),))
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        executor.submit(plan)
    assert len(calls) == 1


def accelerator(text: str, code: int | None) -> torch.AcceleratorError:
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (accelerator("CUDA error: an illegal memory access was encountered", 700), True),
        (accelerator("CUDA error: device-side assert triggered", None), True),
        (accelerator("CUDA error: CUDA-capable device(s) is/are busy or unavailable", 46), True),
        (accelerator("CUDA error: uncorrectable ECC error encountered", 214), True),
        (RuntimeError("CUDA error: unknown error"), True),
        (RuntimeError("HIP error: the operation cannot be performed"), True),
        (accelerator("CUDA error: too many resources requested for launch", 701), False),
        (accelerator("CUDA error: no kernel image is available for execution on the device", None), False),
        (accelerator("CUDA error: out of memory", 2), False),
        (accelerator("CUDA error: operation not permitted when stream is capturing", 900), False),
        (accelerator("CUDA error: operation failed due to a previous error during capture", None), False),
        (accelerator("CUDA error: unspecified launch failure\nnot while capturing", None), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: unspecified launch failure"), False),
    ],
)
def test_what_an_error_means(error: BaseException, gone: bool) -> None:
    assert is_lost(error) is gone
    assert not (gone and is_out_of_memory(error))
    if gone:
        told = lost(error)
        assert str(error).splitlines()[0] in told.message
        assert "dmesg" in told.advice
        assert lost(told) is told


def test_copies_need_a_host() -> None:
    executor, _ = played()
    with pytest.raises(ValueError, match="a host that has room for none"):
        executor.submit(Plan(0, swap_out=((1, 0),)))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_run_with_copies_replays_step_for_step(tmp_path: Path, depth: int) -> None:
    limits = replace(LIMITS, watermark=0.0, enable_prefix_caching=False)
    executor = FakeExecutor(num_blocks=7, host_blocks=16)
    path = tmp_path / "steps.jsonl"
    with path.open("w") as file:
        log = StepLog(limits, executor.capacity(), file)
        scheduler = Scheduler(
            limits, BlockPool(7, 4), StepCost(executor.capacity().prior), features=FEATURES, host_blocks=16
        )
        loop = EngineLoop(scheduler, executor, VirtualClock(), log, depth=depth)
        for name in ("a", "b"):
            loop.handle(add(name, [ord(name)] * 10, 9))
        finish(loop)
        log.close()
    assert scheduler.totals.loaded_blocks > 0
    recorded, replayed = replay(path.read_text().splitlines())
    assert recorded == replayed
    assert any("swap_in" in line for line in recorded)
