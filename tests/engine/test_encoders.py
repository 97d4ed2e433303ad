"""An encoder's engine: whole prompts in the scheduler's steps, what fails alone, and its memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients
from penstock.core.errors import MemoryBudgetError
from penstock.core.executor import Capacity
from penstock.core.plan import Event
from penstock.core.pooling import Pooling
from penstock.core.request_spec import FinishReason, Prompt, RequestSpec
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.core.simulated import SimulatedExecutor, echo
from penstock.engine import build
from penstock.engine.build import Engine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.executor.stream import HostStream
from penstock.engine.messages import Add
from penstock.engine.preview import preview
from penstock.model.together import share
from tests.model.encoders import make_encoder

PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 9, 40, 1, 12)]


def asked(name: str, *ids: tuple[int, ...]) -> RequestSpec:
    return RequestSpec(id=name, prompts=tuple(Prompt(each, 0) for each in ids), pooling=Pooling("cls"))


def test_prompts_are_computed_whole_in_the_order_of_their_arrival() -> None:
    settings = SchedulerConfig(
        max_num_seqs=3,
        max_num_batched_tokens=16,
        max_model_len=64,
        enable_prefix_caching=False,
        whole_prompts=True,
    )
    pool = BlockPool(6, 64)
    scheduler = Scheduler(settings, pool, features=("pooling",))
    scheduler.add(asked("r", *PROMPTS), 0.0)
    executor = SimulatedExecutor(Capacity(6, 64, 128, Coefficients()), echo)
    steps = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        steps.append([item.tokens for item in plan.items])
        assert all(item.start == 0 and item.pools for item in plan.items)
        scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0)
        scheduler.check()
    assert steps == [[5, 9], [40], [1, 12]]  # 40 has a step of its own, and nobody passes it by
    assert pool.available == pool.num_blocks


@pytest.fixture(scope="module", autouse=True)
def _measured_once() -> Iterator[None]:
    """What the machine can do is not measured anew for each engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "inspect_hardware", functools.cache(build.inspect_hardware))
        yield


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    path = make_encoder(tmp_path, "bert")
    made = build_engine(EngineConfig(model=str(path), dtype="float32", threads=1))
    yield made
    made.close()


def run(engine: Engine) -> dict[str, Event]:
    engine.loop.handle(Add(asked("r", *PROMPTS)))
    events: dict[str, Event] = {}
    while engine.loop.has_work:
        for event in engine.loop.step():
            events[event.request] = event
    return events


def test_a_step_that_does_not_fit_is_computed_in_fewer_prompts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(engine)
    model: Any = engine.loop.executor._model  # type: ignore[attr-defined]
    forward, sizes = model.forward, []

    def short_of_memory(ids: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(int((positions == 0).sum()))
        if sizes[-1] > 2:
            raise MemoryError
        return forward(ids, positions, *rest)

    monkeypatch.setattr(model, "forward", short_of_memory)
    again = run(engine)
    assert sizes == [5, 2, 2, 1]
    for name, event in whole.items():
        assert event.pooled is not None
        assert again[name].pooled is not None
        assert again[name].pooled.row == pytest.approx(event.pooled.row, abs=1e-6)  # type: ignore[union-attr]


def test_a_prompt_without_numbers_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = engine.loop.executor._model  # type: ignore[attr-defined]
    forward = model.forward

    def broken(ids: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden = forward(ids, positions, *rest).clone()
        hidden[5] = torch.nan  # the first position of the second prompt
        return hidden

    monkeypatch.setattr(model, "forward", broken)
    events = run(engine)
    assert [events[f"r:{index}"].finish for index in range(5)] == [
        FinishReason.STOP,
        FinishReason.ERROR,
        *[FinishReason.STOP] * 3,
    ]
    failure = events["r:1"].failure
    assert failure is not None
    assert "not finite" in failure.cause


def test_a_step_is_billed_by_the_devices_clock(engine: Engine) -> None:
    class Stream(HostStream):
        """A mark every two seconds, whatever the host's clock says."""

        def __init__(self) -> None:
            self.marks: list[float] = []
            self.waited: list[float] = []

        def mark(self) -> float:
            self.marks.append(2.0 * len(self.marks))
            return self.marks[-1]

        def wait(self, mark: float) -> None:
            self.waited.append(mark)

    stream = engine.loop.executor._stream = Stream()  # type: ignore[attr-defined]
    events = run(engine)
    steps = len(stream.marks) // 2
    assert stream.waited == stream.marks[1::2]
    assert sum(event.device_seconds for event in events.values()) == pytest.approx(2.0 * steps)


def test_memory_is_reckoned_without_a_cache(tmp_path: Path) -> None:
    path = make_encoder(tmp_path, "bert")
    config = EngineConfig(model=str(path), dtype="float32", threads=1)
    need = preview(config, device="cpu", name="embed")
    engine = build_engine(config)
    weights = engine.loop.executor._model.weight_bytes  # type: ignore[attr-defined]
    engine.close()
    assert need.weights == pytest.approx(weights, rel=0.2)  # what training left is on disk
    assert (need.least, need.most) == (0, 0)
    shares = share([need], device="cpu", available=1 << 30)
    assert shares.kv_caches == (0,)
    with pytest.raises(
        MemoryBudgetError, match="--max-model-len 67 is longer than the model's context of 66"
    ):
        preview(EngineConfig(model=str(path), max_model_len=67), device="cpu", name="embed")
