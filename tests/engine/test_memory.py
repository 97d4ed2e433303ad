"""Out of memory in a step: smaller parts, the same tokens, limits that come back; nobody else is harmed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import DeviceOutOfMemory
from penstock.core.executor import Items
from penstock.core.plan import Admission, Event, Outcome, Plan, PlanItem
from penstock.core.request_spec import FinishReason
from penstock.engine.executor.faults import is_out_of_memory
from penstock.engine.executor.memory_limits import Limit, StepLimits
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Add
from penstock.engine.replay import replay
from tests.engine.build import torch_executor
from tests.engine.fake import FakeExecutor, add, spec
from tests.engine.test_loop import cause, make_loop, run


class SmallDevice(FakeExecutor):
    """Has memory for so many tokens, requests and positions of one request; can be changed at any time."""

    def __init__(
        self, tokens: int = 1000, requests: int = 1000, context: int = 1000, **options: object
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.tokens, self.requests, self.context = tokens, requests, context
        self.sizes: list[tuple[int, int]] = []
        """(tokens, requests) of what was computed."""
        self.refused = 0

    def _compute(self, items: Items) -> Sequence[Outcome]:
        tokens = sum(item.tokens for item in items)
        longest = max(item.start + item.tokens for item in items)
        if tokens > self.tokens or len(items) > self.requests or longest > self.context:
            self.refused += 1
            raise MemoryError(f"no room for {tokens} tokens")
        self.sizes.append((tokens, len(items)))
        return super()._compute(items)


def outputs(events: Sequence[Event]) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {}
    for event in events:
        made[event.request] = made.get(event.request, ()) + event.tokens
    return made


def kind(event: Event) -> str:
    """The class of its error."""
    assert event.failure is not None
    return event.failure.type


def serve(loop: EngineLoop, adds: Sequence[Add]) -> list[Event]:
    for message in adds:
        loop.handle(message)
    return run(loop)


WORK = [add(name, [ord(name), *range(n)], 6) for name, n in (("a", 20), ("b", 3), ("c", 17), ("d", 1))]


@pytest.mark.parametrize(("tokens", "requests"), [(15, 4), (7, 4), (1, 4), (16, 1), (5, 2)])
def test_a_step_that_does_not_fit_is_computed_in_parts_with_the_same_result(
    tmp_path: Path, tokens: int, requests: int
) -> None:
    roomy = make_loop()
    expected = outputs(serve(roomy, WORK))
    device = SmallDevice(tokens, requests)
    loop = make_loop(device, log=tmp_path / "steps.jsonl")
    events = serve(loop, WORK)
    assert {event.finish for event in events} <= {None, FinishReason.LENGTH}
    assert outputs(events) == expected
    assert device.refused > 0
    # the plans are those of a device with memory, and so is the replay
    assert loop.scheduler.totals == roomy.scheduler.totals
    assert loop._log is not None
    loop._log.close()
    recorded, replayed = replay((tmp_path / "steps.jsonl").read_text().splitlines())
    assert recorded == replayed
    loop.scheduler.check()


def test_it_does_not_happen_at_every_step_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    device = SmallDevice(tokens=7)
    loop = make_loop(device)
    with caplog.at_level(logging.WARNING, "penstock.engine"):
        serve(loop, [add(str(n), [n, *range(20)], 2) for n in range(8)])
    assert device.refused == 3  # 16, and both halves of it; then never more than 4
    (record,) = caplog.records
    text = record.getMessage()
    for part in (
        "out of memory in step 0 with 16 tokens of 1 request (MemoryError: no room for 16 tokens)",
        "parts of at most 4 tokens and any number of requests",
        "--max-num-batched-tokens",
    ):
        assert part in text


def test_too_many_logits_do_not_cut_prompts() -> None:
    """A step of decode that does not fit lowers the number of requests, not of tokens."""
    device = SmallDevice(requests=2)
    loop = make_loop(device)
    for name in "abcd":
        loop.handle(add(name, [ord(name)], 20))
    loop.step()
    assert device.recovery.limits == StepLimits(requests=Limit(2, failed=4))
    loop.handle(add("long", range(14), 1))
    run(loop)
    assert max(device.sizes) == (14, 1)


def test_limits_come_back_by_doubling(caplog: pytest.LogCaptureFixture) -> None:
    device = SmallDevice(tokens=2)
    loop = make_loop(device, max_model_len=200)
    loop.handle(add("a", range(16), 2))
    loop.step()
    assert device.recovery.limits.tokens == Limit(2, failed=16)
    device.tokens = 1000
    seen: list[int] = []
    with caplog.at_level(logging.INFO, "penstock.engine"):
        for turn in range(4):
            loop._clock.spent(0.8)
            loop.handle(add(f"early {turn}", [turn] * 16, 1))
            run(loop)
            seen.append(max(device.sizes)[0])
            loop._clock.spent(0.3)
            device.sizes.clear()
            loop.handle(add(f"late {turn}", [50 + turn] * 16, 1))
            run(loop)
            seen.append(max(device.sizes)[0])
    assert seen == [2, 4, 4, 8, 8, 16, 16, 16]
    assert device.recovery.limits == StepLimits()
    assert not device.recovery.limits.active
    assert "any number of tokens" in caplog.text


def test_a_lasting_shortage_costs_an_attempt_a_minute_and_is_forgotten_in_the_end() -> None:
    device = SmallDevice(tokens=8)
    loop = make_loop(device)
    numbers = iter(range(1000))

    def attempts(seconds: int) -> int:
        """How often too much was tried, with a request every second."""
        before = device.refused
        for _ in range(seconds):
            number = next(numbers)
            serve(loop, [add(str(number), [number] * 16, 1)])
            loop._clock.spent(1.0)
        return device.refused - before

    assert attempts(30) == 4  # 0, 1, 5 and 21 s
    assert attempts(300) == 5
    device.tokens = 1000
    assert attempts(200) == 0
    device.tokens = 8
    assert attempts(4) == 2  # a new one begins with a second


def test_a_request_that_does_not_fit_alone_fails_and_slows_nobody(caplog: pytest.LogCaptureFixture) -> None:
    device = SmallDevice(context=30, probe=lambda: None)
    loop = make_loop(device)
    with caplog.at_level(logging.WARNING, "penstock.engine"):
        events = serve(loop, [add("a", range(9), 8), add("huge", range(100, 140), 8), add("b", [3] * 9, 8)])
    last = {event.request: event for event in events}
    assert last["a"].finish is last["b"].finish is FinishReason.LENGTH
    assert last["huge"].finish is FinishReason.ERROR
    failure = last["huge"].failure
    assert failure is not None
    assert failure.type == "DeviceOutOfMemory"
    assert "MemoryError: no room" in failure.cause
    assert "--max-num-batched-tokens, --max-num-seqs or --kv-cache-memory-bytes" in failure.advice
    assert device.recovery.limits == StepLimits()
    assert "not even one token could be computed of: huge" in caplog.text
    loop.scheduler.check()


def test_what_did_not_fit_is_not_found_in_the_prefix_cache() -> None:
    device = SmallDevice(context=10)
    loop = make_loop(device)
    assert kind(serve(loop, [add("a", range(16), 1)])[-1]) == "DeviceOutOfMemory"
    device.context = 1000
    (event,) = serve(loop, [add("b", range(16), 1)])
    assert event.cached == 0
    assert event.tokens == (0,)


def test_sharers_of_blocks_that_were_never_filled_start_over() -> None:
    """Both are in one step; the second stands on the first one's blocks."""
    device = SmallDevice(failing={"a": MemoryError("no room")})
    loop = make_loop(device, max_num_batched_tokens=64)
    loop.handle(add("a", range(13), 2))
    loop.handle(add("b", range(13), 2))
    (failure,) = loop.step()
    assert (failure.request, kind(failure)) == ("a", "DeviceOutOfMemory")
    assert [item.start for item in loop.last_plan.items] == [0, 12]
    assert outputs(run(loop)) == {"b": (0, 1)}
    assert loop.scheduler.totals.steps == 3
    loop.scheduler.check()


def test_steps_in_parts_teach_the_cost_model_nothing() -> None:
    loop = make_loop(SmallDevice(tokens=8))
    loop.handle(add("a", range(32), 1))
    before = loop.scheduler.cost.coefficients
    for _ in range(2):
        loop.step()
    assert loop.scheduler.cost.observed == 0
    assert loop.scheduler.cost.coefficients == before


def test_every_device_second_is_billed_in_parts_too() -> None:
    loop = make_loop(SmallDevice(tokens=3))
    bills = sum(event.device_seconds for event in serve(loop, WORK) if event.finish)
    assert bills == pytest.approx(loop.meter.busy)
    assert bills + loop.meter.idle(loop._clock.now()) == pytest.approx(loop._clock.now() - 100.0)


def test_a_request_that_breaks_a_step_is_still_found_while_steps_run_in_parts() -> None:
    device = SmallDevice(tokens=4, failing={"bad": RuntimeError("kernel exploded")})
    loop = make_loop(device)
    events = serve(loop, [add("a", range(9), 3), add("bad", [7, 7], 3), add("b", [8, 8], 3)])
    last = {event.request: event for event in events}
    assert (cause(last["bad"]), kind(last["bad"])) == ("RuntimeError: kernel exploded", "RequestFailed")
    assert last["a"].finish is last["b"].finish is FinishReason.LENGTH


def test_logprobs_of_a_prompt_in_parts_are_whole() -> None:
    whole, parts = (
        serve(make_loop(device), [add("a", range(30), 1, prompt_logprobs=0)])[-1].prompt_logprobs
        for device in (FakeExecutor(), SmallDevice(tokens=3))
    )
    assert whole is not None
    assert len(whole) == 29
    assert parts == whole


def test_a_shortage_that_passes_does_not_end_the_engine_and_one_that_lasts_does() -> None:

    def probe() -> None:
        if device.tokens < 8:
            raise DeviceOutOfMemory("MemoryError: nothing is left")

    device = SmallDevice(probe=probe)
    loop = make_loop(device)

    def ask(name: str) -> Event:
        return serve(loop, [add(name)])[-1]

    device.tokens = 0
    assert kind(ask("a")) == "DeviceOutOfMemory"
    loop._clock.spent(59)
    assert kind(ask("b")) == "DeviceOutOfMemory"
    device.tokens = 16
    assert ask("c").finish is FinishReason.LENGTH  # from here on the minute counts anew
    device.tokens = 0
    loop._clock.spent(30)
    assert kind(ask("d")) == "DeviceOutOfMemory"
    loop._clock.spent(61)
    with pytest.raises(DeviceOutOfMemory, match="nothing is left"):
        ask("e")
    loop.scheduler.check()


items = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60), st.booleans()), min_size=1, max_size=12)


@given(items, st.integers(1, 40), st.integers(1, 5))
def test_parts_are_within_the_limits_and_make_up_the_plan(
    sizes: list[tuple[int, int, bool]], tokens: int, requests: int
) -> None:
    whole = [
        PlanItem(str(n), n, start, count, (n,), int(sample)) for n, (start, count, sample) in enumerate(sizes)
    ]
    parts = StepLimits(Limit(tokens), Limit(requests)).split(whole)
    assert all(len(part) <= requests and sum(item.tokens for item in part) <= tokens for part in parts)
    positions = [
        (item.request, item.start + i) for part in parts for item in part for i in range(item.tokens)
    ]
    assert positions == [(item.request, item.start + i) for item in whole for i in range(item.tokens)]
    ends = {(item.request, item.start + item.tokens) for part in parts for item in part if item.samples}
    assert ends == {(item.request, item.start + item.tokens) for item in whole if item.samples}
    assert len({item.request for part in parts for item in part if item.blocks}) == len(whole)


# ---------------------------------------------------------------------------- torch


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_words_that_mean_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_other_failures_are_not_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def exhausted() -> None:
    """What torch's allocator does when there is not enough."""
    torch.empty(1 << 46, dtype=torch.uint8)


def crowd(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch, most: int
) -> list[weakref.ref[torch.Tensor]]:
    """Let the model's forward run out of memory beyond so many tokens; gives what it had allocated."""
    forward = executor._model.forward
    allocated: list[weakref.ref[torch.Tensor]] = []

    def crowded(token_ids: torch.Tensor, *args: object) -> torch.Tensor:
        if len(token_ids) > most:
            activations = torch.zeros(1000)
            allocated.append(weakref.ref(activations))
            exhausted()
        return forward(token_ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(executor, "_model", _Crowded(executor._model, crowded))
    return allocated


class _Crowded:
    """A model with another forward; models are shared between tests."""

    def __init__(self, model: object, forward: Callable[..., torch.Tensor]) -> None:
        self._model = model
        self.forward = forward

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


def test_torchs_own_error_is_told_and_the_failed_steps_tensors_are_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = torch_executor(num_blocks=8)
    allocated = crowd(executor, monkeypatch, 4)
    item = PlanItem("a", 0, 0, 3, (5, 2))
    executor.submit(Plan(0, (Admission("a", 0, spec("a", range(6)), 0),), (item,)))
    with pytest.raises(DeviceOutOfMemory, match="DefaultCPUAllocator: can't allocate memory") as caught:
        executor._compute((item._replace(tokens=6, samples=1),))
    assert len(allocated) == 1
    assert allocated[0]() is None  # although the exception is still held
    assert caught.value.status == 503
    executor.close()


@pytest.mark.parametrize("most", [1, 5])
def test_a_real_model_gives_the_same_tokens_in_parts(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Prompts with a common beginning, so that one part reads blocks that an earlier one filled."""
    prompts = {"a": range(3, 25), "b": [*range(3, 17), 99], "c": [5, 4], "d": range(3, 25)}
    made = []
    for limit in (None, most):
        executor = torch_executor()
        allocated = crowd(executor, monkeypatch, limit) if limit else []
        loop = make_loop(executor, max_num_batched_tokens=32)
        events = serve(
            loop, [add(name, list(prompt), 5, temperature=0.0) for name, prompt in prompts.items()]
        )
        made.append(outputs(events))
        assert all(len(tokens) == 5 for tokens in made[-1].values())
        assert bool(allocated) == bool(limit)
        executor.close()
    assert made[0] == made[1]
