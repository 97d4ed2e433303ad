"""What is decided when an engine is built, and the sums and sizes that its steps are cut by."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.core.plan import Event, Failure, PlanItem, TokenLogprob
from penstock.engine import build as module
from penstock.engine.build import _dtype, _kept, _progress_bar, _quantization, _Timer
from penstock.engine.config import EngineConfig
from penstock.engine.executor.drafts import verified
from penstock.engine.executor.faults import is_out_of_memory
from penstock.engine.executor.memory_limits import Limit, StepLimits
from penstock.engine.loop import _MOST_RETRY_AFTER, EngineLoop
from penstock.engine.messages import Abort
from penstock.kernels.capability import Device
from penstock.sampling.sampler import Sampled

from .fake import FakeExecutor, add
from .test_loop import make_loop, run

CPU = Device("cpu")


# ---- types and schemes ----


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "device", "chosen"),
    [
        ("auto", "float32", "cpu", torch.float32),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("auto", "float16", "cpu", torch.bfloat16),
        ("auto", "float16", "cuda", torch.float16),
        ("float16", "float32", "cpu", torch.float16),
        ("bfloat16", "float16", "cuda", torch.bfloat16),
    ],
)
def test_the_type_is_the_checkpoints_but_for_float16_on_a_cpu(
    wanted: str, checkpoint: str, device: str, chosen: torch.dtype
) -> None:
    config = cast(Any, SimpleNamespace(dtype=checkpoint))
    assert _dtype(wanted, config, Device(device)) == chosen


def operations(**fields: Any) -> Any:
    known = {
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "schemes": ("int8", "w8a8", "int4"),
        "multiplies_integers": True,
        "batch_invariant": False,
        "name": "cpu",
    }
    return SimpleNamespace(**known | fields)


def test_a_scheme_is_what_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert _quantization(EngineConfig(), operations(schemes=()), CPU) is None
    assert _quantization(EngineConfig(quantization="w8a8"), operations(), CPU) == "w8a8"
    assert caplog.messages == []
    assert (
        _quantization(EngineConfig(quantization="int4"), operations(multiplies_integers=False), CPU) == "int4"
    )
    assert caplog.messages == [
        "This processor has no instructions for products of 8-bit integers: "
        "--quantization int4 saves memory here, and makes prompts no faster."
    ]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"dtype": torch.float16}, "--dtype", "not in float16. Use --dtype bfloat16."),
        (
            {"schemes": ("int4",)},
            "--quantization",
            "needs the CPU kernels, which are not there. The log says",
        ),
    ],
)
def test_a_scheme_that_cannot_be_used_here(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(StartupError, match=r"^--quantization int8 ") as caught:
        _quantization(EngineConfig(quantization="int8"), operations(**fields), CPU)
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "fields", "words"),
    [
        ("torch", {"batch_invariant": True}, "kept; equal requests with equal seeds get equal bytes"),
        ("torch", {}, "not kept by --attention-backend torch"),
        ("reference", {}, "not kept by --attention-backend reference"),
        ("auto", {"name": "torch"}, "not kept by the torch operators on cpu"),
        ("auto", {}, "off, it may cost speed here; --batch-invariant keeps it"),
    ],
)
def test_the_log_says_whether_batches_matter(backend: str, fields: dict[str, Any], words: str) -> None:
    assert _kept(EngineConfig(attention_backend=backend), operations(**fields)).startswith(words)


def test_progress_is_a_bar_on_a_terminal_and_a_line_in_a_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(module.sys, "stderr", terminal := Terminal())
    draw = _progress_bar()
    draw(0, 4 << 20)
    draw(2 << 20, 4 << 20)
    draw(4 << 20, 4 << 20)
    draw(0, 0)
    full, none = "█" * 30, "░" * 30
    assert terminal.getvalue().split("\r") == [
        "",
        f"loading weights {none} 0/4 MiB",
        f"loading weights {'█' * 15}{'░' * 15} 2/4 MiB",
        f"loading weights {full} 4/4 MiB\n",
        f"loading weights {full} 0/0 MiB\n",
    ]
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    report = _progress_bar()
    with caplog.at_level("INFO", "penstock.engine"):
        report(3 << 20, 4 << 20)
        assert caplog.messages == []
        report(4 << 20, 4 << 20)
    assert caplog.messages == ["loaded 4 MiB of weights"]


def test_parts_of_a_start_are_timed_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.25, 12.2504])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    timer = _Timer()
    timer.lap("inspect")
    timer.lap("load")
    assert timer.laps == {"inspect": 0.25, "load": 2.0}
    assert str(timer) == "inspect 0.25 s, load 2.00 s"


# ---- steps in parts ----


def item(tokens: int, *, samples: int = 1, drafts: int = 0, start: int = 0, name: str = "a") -> PlanItem:
    return PlanItem(name, 0, start, tokens, (1,), samples, drafts=tuple(range(drafts)))


@given(size=st.integers(2, 10**6), times=st.integers(0, 25))
def test_a_limit_halves_and_comes_back_by_doubling_until_it_is_gone(size: int, times: int) -> None:
    limit = Limit().lowered(size)
    assert limit == Limit(size // 2, failed=size)
    assert str(limit) == f"at most {size // 2}"
    for _ in range(times):
        before = limit
        limit = limit.lowered(limit.value)
        assert limit == Limit(max(1, before.value // 2), failed=size)
    steps = 0
    while limit != Limit():
        before, limit = limit, limit.raised()
        assert limit == (Limit() if 2 * before.value >= size else Limit(2 * before.value, size))
        steps += 1
    assert steps <= times + 2
    assert str(Limit()) == "any number of"


def test_what_is_lowered_is_what_there_is_too_much_of() -> None:
    decode = [item(1), item(1), item(1), item(1)]
    assert StepLimits().lowered(decode) == StepLimits(requests=Limit(2, failed=4))
    assert StepLimits().lowered([*decode, item(2)]) == StepLimits(tokens=Limit(3, failed=6))
    both = StepLimits(Limit(3, 6), Limit(2, 4))
    assert both.active
    assert not StepLimits().active
    assert both.raised() == StepLimits()
    assert StepLimits(Limit(3, 100), Limit(1, 4)).raised() == StepLimits(Limit(6, 100), Limit(2, 4))
    assert str(both) == "at most 3 tokens and at most 2 requests"
    assert str(StepLimits(tokens=Limit(3, 6))) == "at most 3 tokens and any number of requests"


def test_a_step_just_within_the_limits_is_whole() -> None:
    items = [item(3), item(4, name="b")]
    assert StepLimits(Limit(7), Limit(2)).split(items) == [tuple(items)]
    assert StepLimits(Limit(7), Limit(1)).split(items) == [(items[0],), (items[1],)]
    first, second = StepLimits(Limit(6), Limit(2)).split(items)
    assert first == (items[0], items[1]._replace(tokens=3, samples=0, pools=False))
    [rest] = second
    assert (rest.start, rest.tokens, rest.samples) == (3, 1, 1)


def test_drafts_are_dropped_where_they_do_not_fit() -> None:
    drafted = item(4, samples=4, drafts=3, start=9)
    assert StepLimits(Limit(4)).split([drafted]) == [(drafted,)]
    [[alone]] = StepLimits(Limit(3)).split([drafted])
    assert (alone.start, alone.tokens, alone.samples, alone.drafts) == (9, 1, 1, ())
    pooling = item(4, samples=0)._replace(pools=True)
    [[first], [second]] = StepLimits(Limit(3)).split([pooling])
    assert (first.pools, second.pools) == (False, True)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul"), False),
        (RuntimeError("CUDA out of memory. Tried"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("no"), False),
        (ValueError("out of memory"), False),
        (KeyError("bad_alloc"), False),
    ],
)
def test_words_that_mean_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


# ---- drafts ----


def sampled(*tokens: int, bad: int | None = None) -> list[Sampled]:
    return [
        Sampled(token, error="not finite" if place == bad else None) for place, token in enumerate(tokens)
    ]


@pytest.mark.parametrize(
    ("drafts", "choices", "tokens", "place"),
    [
        ((), sampled(5), (5,), 0),
        ((5,), sampled(5, 6), (5, 6), 0),
        ((5,), sampled(4, 6), (4,), 0),
        ((5, 6), sampled(5, 7, 8), (5, 7), 0),
        ((5, 6), sampled(5, 6, 8), (5, 6, 8), 0),
        ((), sampled(5, bad=0), None, 0),
        ((5, 6), sampled(5, 6, 8, bad=1), None, 1),
        ((5, 6), sampled(5, 6, 8, bad=2), None, 2),
        ((5, 6), sampled(4, 6, 8, bad=1), (4,), 0),
    ],
)
def test_tokens_are_kept_up_to_the_first_draft_that_was_wrong(
    drafts: tuple[int, ...], choices: list[Sampled], tokens: tuple[int, ...] | None, place: int
) -> None:
    outcome, checked = verified(drafts, choices)
    assert checked == place
    if tokens is None:
        assert outcome.failure == Failure("not finite")
    else:
        assert (outcome.tokens, outcome.logprobs, outcome.failure) == (tokens, (), None)


def test_log_probabilities_of_drafts_are_kept_with_their_tokens() -> None:
    entries = [TokenLogprob(token, -0.5, 1) for token in (5, 6, 8)]
    choices = [Sampled(entry.token, entry) for entry in entries]
    outcome, _ = verified((5, 7), choices)
    assert (outcome.tokens, outcome.logprobs) == ((5, 6), tuple(entries[:2]))
    outcome, _ = verified((), choices[:1])
    assert outcome.logprobs == (entries[0],)


# ---- when to come back ----


def refused(loop: EngineLoop) -> int:
    event = Event("x", failure=Failure("full", "QueueFull"))
    plain = Event("y")
    first, second = loop._with_retry_after([event, plain])
    assert second is plain
    assert first.failure is not None
    assert first.failure.retry_after is not None
    return first.failure.retry_after


def test_who_is_refused_is_told_when_the_queue_may_have_room() -> None:
    """The prompts and the steps that are left, in seconds, times the share of those that wait."""
    loop = make_loop(FakeExecutor(num_blocks=64), max_num_seqs=2, max_num_batched_tokens=16)
    assert refused(loop) == 1
    for name in "abcdef":
        loop.handle(add(name, range(10), max_tokens=5))
    loop.step()
    scheduler = loop.scheduler
    costs = scheduler.cost.coefficients
    prompt, output = scheduler.backlog()
    running, waiting = len(scheduler.running), scheduler.waiting
    assert running
    assert waiting
    step = costs.fixed + running * (costs.per_token + costs.per_sample)
    seconds = (prompt * costs.per_token + output / running * step) * waiting / (running + waiting)
    assert refused(loop) == min(_MOST_RETRY_AFTER, max(1, math.ceil(seconds)))
    slow = type(costs)(fixed=2.0, per_token=0.25, per_context=0.0, per_sample=0.5)
    scheduler.cost.coefficients = slow
    step = 2.0 + running * 0.75
    seconds = (prompt * 0.25 + output / running * step) * waiting / (running + waiting)
    assert refused(loop) == min(60, math.ceil(seconds))
    scheduler.cost.coefficients = type(costs)(fixed=1e6)
    assert refused(loop) == 60
    loop.handle(Abort(scheduler.unfinished))
    run(loop)
