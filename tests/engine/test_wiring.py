"""An engine is built as its flags say: what reaches the model, cache, scheduler, loop and log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.cost import Coefficients
from penstock.core.plan import Plan
from penstock.core.request_spec import Pooling, Prompt, RequestSpec
from penstock.engine.build import Engine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Add
from tests.engine.build import checkpoint
from tests.engine.fake import spec


@contextmanager
def built(heartbeat: Heartbeat | None = None, **fields: Any) -> Iterator[Engine]:
    values = {
        "model": str(checkpoint()),
        "device": "cpu",
        "dtype": "float32",
        "kv_cache_memory_bytes": 1 << 18,
        "threads": 1,
        **fields,
    }
    engine = build_engine(EngineConfig(**values), heartbeat)
    try:
        yield engine
    finally:
        engine.close()


def answer(loop: EngineLoop, request: RequestSpec) -> list[int]:
    loop.handle(Add(request))
    tokens = []
    while loop.has_work:
        for event in loop.step():
            assert event.failure is None, event.failure
            tokens += event.tokens
    return tokens


def test_the_start_says_what_it_found_and_decided(caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    caplog.set_level(logging.INFO, logger="penstock.engine")
    with built(max_num_seqs=3, max_num_batched_tokens=48, block_size=8) as engine:
        info = engine.info
    said = caplog.messages
    assert any("threads" in line or "cores" in line for line in said), "the machine"
    assert any(line.startswith("batch invariance: ") for line in said)
    assert any("max_num_seqs 3, " in line and "batched_tokens 48" in line for line in said), "the limits"
    ready = next(line for line in said if line.startswith("engine ready: "))
    assert f"{info.architecture}, float32 on cpu; inspect " in ready
    for part in ("inspect", "load", "cache", "warm up"):
        assert f"{part} " in ready
        assert info.startup_seconds[part] >= 0
    assert list(info.startup_seconds) == ["inspect", "load", "cache", "warm up"]
    table = capsys.readouterr().err
    assert "KV cache" in table, "offline, nobody else says where the memory goes"
    assert (info.block_size, info.max_num_seqs) == (8, 3)


def test_a_server_has_the_memory_table_in_its_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level(logging.INFO, logger="penstock.engine")
    monkeypatch.setattr("penstock.engine.build.logs.configured", lambda: True)
    with built():
        pass
    assert any("KV cache" in line for line in caplog.messages)
    assert "KV cache" not in capsys.readouterr().err


def test_the_cache_has_a_block_more_than_requests_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the probe's, which writes into it while all others are in use."""
    with built() as engine:
        executor: Any = engine.loop.executor
        assert executor._cache.num_blocks == engine.info.num_blocks + 1
        assert executor.capacity().num_blocks == engine.info.num_blocks


def test_threads_are_those_that_were_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        with built(threads=1):
            assert torch.get_num_threads() == 1
        with built(threads=2):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_weights_that_are_made_up_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint() / "config.json").read_text())
    with built(model=str(tmp_path), load_format="dummy") as engine:
        assert len(answer(engine.loop, spec("a", max_tokens=2, temperature=0.0, ignore_eos=True))) == 2


@pytest.mark.parametrize("wanted", [True, False])
def test_the_promise_about_batches_reaches_the_operations(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    from penstock.engine import build

    create = build.create_operations

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return create(*arguments, **options)

    monkeypatch.setattr(build, "create_operations", noted)
    with built(batch_invariant=wanted, attention_backend="auto"):
        pass
    (options,) = asked
    assert (options["batch_invariant"], options["attention"], options["quantized"]) == (wanted, "auto", False)


def test_what_the_executor_can_do_the_scheduler_lets_through() -> None:
    with built() as engine:
        loop = engine.loop
        loop.handle(Add(RequestSpec(id="p", prompts=(Prompt((1, 2, 3), 0),), pooling=Pooling())))
        events = [event for _ in range(3) if loop.has_work for event in loop.step()]
        assert [event.failure for event in events] == [None]
        assert events[0].finish is not None


@pytest.mark.parametrize(("ahead", "depth"), [(False, 1), (True, 2)])
def test_how_many_steps_are_in_flight(ahead: bool, depth: int) -> None:
    with built(async_scheduling=ahead) as engine:
        assert engine.loop._depth == depth


def test_what_the_host_keeps_changes_no_answer() -> None:
    """Eight requests on a cache for two: preempted, copied or computed again."""
    answers, totals = [], []
    for size in (0.0, 0.01):
        fields = {"max_model_len": 128, "max_num_seqs": 8, "enable_prefix_caching": False}
        with built(kv_offloading_size=size, **fields) as engine:
            assert bool(engine.loop.executor.capacity().host_blocks) is bool(size)
            loop = engine.loop
            loop.scheduler.cost.coefficients = (
                Coefficients()
            )  # copies cost nothing, whatever the machine does
            loop.scheduler.cost.observe = lambda plan, seconds: None  # type: ignore[method-assign]
            for number in range(8):
                prompt = tuple(range(3 + number, 40 + number))
                wanted = spec(f"r{number}", prompt, 60, temperature=0.0, ignore_eos=True)
                loop.handle(Add(wanted))
            made: dict[str, list[int]] = {}
            for _ in range(2000):
                if not loop.has_work:
                    break
                for event in loop.step():
                    made.setdefault(event.request, []).extend(event.tokens)
            answers.append(made)
            totals.append(loop.scheduler.totals)
    assert answers[0] == answers[1]
    assert totals[0].preemptions > 0
    assert totals[0].recomputed_tokens > 0
    assert totals[1].loaded_blocks > 0
    assert totals[1].recomputed_tokens == 0


def test_the_heartbeat_knows_each_step(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat", create=True)
    began: list[tuple[float, float]] = []
    begin = heartbeat.begin
    heartbeat.begin = lambda now, predicted: (began.append((now, predicted)), begin(now, predicted))[1]  # type: ignore[method-assign]
    with built(heartbeat) as engine:
        answer(engine.loop, spec("a", max_tokens=3, temperature=0.0, ignore_eos=True))
        progress, begun, _, steps = heartbeat.read()
        assert steps == 3
        assert progress > 0
        assert begun == 0, "none is under way"
    assert len(began) >= 3
    assert all(predicted > 0 for _, predicted in began[-3:])
    heartbeat.close()


def test_requests_without_a_seed_are_repeated_by_the_engines() -> None:
    drawn = []
    for seed in (5, 5, 6):
        with built(seed=seed) as engine:
            request = spec("a", max_tokens=8, temperature=5.0, ignore_eos=True)
            drawn.append(answer(engine.loop, request))
    assert drawn[0] == drawn[1] != drawn[2]


def test_ends_of_sequences_come_from_both_files(tmp_path: Path) -> None:
    for file in checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    generation = {"eos_token_id": [3, 10**6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with built(model=str(tmp_path)) as engine:
        assert engine.info.eos_ids == (3, 7)
    with built(model=str(tmp_path), generation_config="vllm") as engine:
        assert engine.info.eos_ids == (3, 7), "as vLLM has it: the flag is about defaults of sampling"


def test_steps_are_recorded_where_a_file_is_named(tmp_path: Path) -> None:
    record = tmp_path / "steps"
    with built(record_steps=str(record)) as engine:
        answer(engine.loop, spec("a", max_tokens=2, temperature=0.0, ignore_eos=True))
    assert record.read_bytes()


def test_a_step_in_parts_is_expected_anew_with_each_part(tmp_path: Path) -> None:
    """A step that is cut for want of memory takes longer: whoever watches is told with every part."""
    page = Heartbeat(tmp_path / "page", create=True)
    with built(Heartbeat(tmp_path / "page")) as engine:
        executor = engine.loop.executor
        engine.loop.handle(Add(spec("a", range(8))))
        cost = engine.loop.scheduler.cost
        plan = engine.loop.scheduler.schedule(0.0)
        executor.recovery._progress(plan.items)
        _, began, predicted, _ = page.read()
        assert began > 0
        assert predicted == pytest.approx(cost.predict(plan))
        assert predicted > cost.predict(Plan(0))


def test_a_long_context_is_planned_for_only_as_far_as_it_is_wanted(capsys: Any) -> None:
    with built(max_model_len=24) as engine:
        assert engine.info.max_model_len == 24
    assert "24 tokens" in capsys.readouterr().err
