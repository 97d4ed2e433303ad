"""The CPU kernels from Python: that they are there, what is refused at each bound, how they are compiled."""

from __future__ import annotations

import os
import tempfile
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels import reference
from penstock.kernels.attention import Span, StepLayout
from penstock.kernels.cpu import attention, build, library
from penstock.kernels.cpu.attention import CpuAttention
from penstock.kernels.cpu.build import BuildError
from penstock.kernels.cpu.operations import cpu_operations
from penstock.kernels.create import create_operations
from penstock.kernels.reference import ReferenceAttention
from penstock.kernels.torch_operations import torch_operations

from .test_attention import make_step
from .test_cpu_build import Compiler

LIBRARY = library.available(wait_seconds=120)
needs_library = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path, monkeypatch)


def test_they_pass_their_own_test_where_there_is_a_compiler() -> None:
    """Else every other test of them would be left out, and nobody would see it."""
    if build.find_compiler() is None or os.environ.get("PENSTOCK_CPU_KERNELS") == "0":
        pytest.skip("no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
    assert LIBRARY is not None


# ---- attention ----


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("number", [1, 40])
def test_steps_of_few_and_of_many_spans(number: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the room for the plan is exactly what is needed, and where it is one word less."""
    assert LIBRARY is not None
    step = make_step([(7 * i % 23, 1 + i % 5) for i in range(number)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = ReferenceAttention(step.spec).prepare(step.layout)(
            step.q, step.k, step.v, step.keys.clone(), step.values.clone(), scale=0.5, window=None
        )
        got = CpuAttention(LIBRARY, step.spec).prepare(step.layout)(
            step.q, step.k, step.v, step.keys.clone(), step.values.clone(), scale=0.5, window=None
        )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@needs_library
def test_a_cache_may_end_with_the_last_block_and_not_before() -> None:
    assert LIBRARY is not None
    step = make_step([(5, 1)])
    spec = step.spec
    backend = CpuAttention(LIBRARY, spec)
    shape = (spec.num_kv_heads, spec.block_size, spec.head_dim)
    prepared = backend.prepare(StepLayout([Span(0, 1, [2])], spec.block_size))
    assert prepared._blocks == range(2, 3)
    prepared.check_caches(torch.zeros(3, *shape), torch.zeros(4, *shape))
    with pytest.raises(IndexError, match=r"blocks range\(2, 3\) of a cache of 2"):
        prepared.check_caches(torch.zeros(3, *shape), torch.zeros(2, *shape))
    with pytest.raises(IndexError, match="of a cache of 3"):
        backend.prepare(StepLayout([Span(0, 1, [-1])], spec.block_size)).check_caches(torch.zeros(3, *shape))
    for cache in (
        torch.zeros(3, *shape, dtype=torch.float64),
        torch.zeros(3, shape[0], shape[1], shape[2] + 1),
        torch.zeros(3, shape[0] + 1, shape[1], shape[2]),
        torch.zeros(6, *shape)[::2],
    ):
        with pytest.raises(ValueError, match="prepared for"):
            prepared.check_caches(cache)


@needs_library
def test_blocks_that_a_span_does_not_reach_are_not_looked_at() -> None:
    assert LIBRARY is not None
    step = make_step([(5, 1)])
    spec = step.spec
    size = spec.block_size
    backend = CpuAttention(LIBRARY, spec)
    for start, tokens, reached in ((0, size, 1), (0, size + 1, 2), (size - 1, 1, 1), (size, 1, 2)):
        prepared = backend.prepare(StepLayout([Span(start, tokens, [4, 5, 9][: max(reached, 1)])], size))
        assert prepared._tables.tolist() == [4, 5, 9][:reached]
        assert prepared._blocks == range(4, 4 + reached)


@needs_library
def test_a_batch_has_as_many_rows_as_its_step() -> None:
    assert LIBRARY is not None
    step = make_step([(5, 2), (0, 3)])
    prepared = CpuAttention(LIBRARY, step.spec).prepare(step.layout)
    prepared.check_rows(5)
    for rows in (4, 6):
        with pytest.raises(ValueError, match=f"{rows} rows; prepared for 5"):
            prepared.check_rows(rows)


@needs_library
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inputs_of_another_shape_or_type_are_refused(name: str) -> None:
    assert LIBRARY is not None
    step = make_step([(5, 2)])
    prepared = CpuAttention(LIBRARY, step.spec).prepare(step.layout)
    inputs = {"q": step.q, "k": step.k, "v": step.v}
    good = inputs[name]
    for wrong in (good.double(), good[:1], good[:, :, :-1], good.repeat(2, 1, 1)):
        with pytest.raises(ValueError, match="; need "):
            prepared(**{**inputs, name: wrong}, key_cache=step.keys, value_cache=step.values, scale=1.0)


def test_a_plan_is_made_again_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With exactly the room that it asked for."""
    rooms: list[int] = []
    answers = [(40, 3, 5, 7), (40, 3, 5, 7)]

    class Fake:
        def plan(self, arguments: Any, at: int, room: int, sizes: Any) -> None:
            rooms.append(room)
            sizes[:] = answers[len(rooms) - 1]

    arguments = attention.AttentionArguments(kv_heads=1, spans=1, dim=6)
    plan = attention._Plan(Fake(), arguments)  # type: ignore[arg-type]
    assert rooms == [82, 40 * 9 + 3 * 2 + 5 + 1]
    assert arguments.groups - arguments.units == 4 * 9 * 40
    assert arguments.lots - arguments.groups == 4 * 2 * 3
    assert len(plan._remaining) == 3
    assert plan.partial_bytes == 4 * 7 * 8
    rooms.clear()
    answers = [(8, 2, 5, 7)]  # 72 + 4 + 5 + 1, all there is
    attention._Plan(Fake(), arguments)  # type: ignore[arg-type]
    assert rooms == [82]
    rooms.clear()
    answers = [(8, 2, 6, 7), (1, 0, 1, 0)]
    small = attention._Plan(Fake(), arguments)  # type: ignore[arg-type]
    assert rooms == [82, 83]
    assert len(small._remaining) == 1


# ---- the compiler ----


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_CACHE", raising=False)
    for cache in ("", "somewhere/else"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        with pytest.raises(BuildError, match="no home directory") as caught:
            build.cache_dir()
        assert caught.value.advice == "Set PENSTOCK_CACHE to a writable directory."


def test_the_first_compiler_that_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None
    for name in ("c++", "clang++", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert build.find_compiler() == (name,)
    monkeypatch.setenv("CXX", "c++ -m64 '-D A'")
    assert build.find_compiler() == ("c++", "-m64", "-D A")
    monkeypatch.setenv("CXX", "none-such")
    assert build.find_compiler() is None


@pytest.mark.parametrize(("cores", "workers"), [(None, 1), (1, 1), (4, 4), (64, 4)])
def test_at_most_four_files_are_compiled_at_a_time_beside_their_target(
    compiler: Compiler, cores: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[int] = []
    places: list[tuple[str, Path]] = []

    class Pool(futures.ThreadPoolExecutor):
        def __init__(self, number: int) -> None:
            pools.append(number)
            super().__init__(number)

    class Directory(tempfile.TemporaryDirectory[str]):
        def __init__(self, prefix: str, dir: Path) -> None:
            places.append((prefix, dir))
            super().__init__(prefix=prefix, dir=dir)

    monkeypatch.setattr(build, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", Directory)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    path = build.build()
    assert pools == [workers]
    assert places == [("building-", compiler.cache)]
    assert path.stat().st_mode & 0o777 == 0o700
    assert compiler.cache.stat().st_mode & 0o777 == 0o700


def test_the_first_complaint_or_the_beginning_of_all(compiler: Compiler) -> None:
    compiler.install("printf '%0600d' 7 >&2; exit 1")
    with pytest.raises(BuildError) as caught:
        build.build()
    assert f"cxx failed: {'0' * 500}." in str(caught.value)
    compiler.install("printf 'note: a\\n x error: b \\nerror: c\\n' >&2; exit 1", version="2")
    with pytest.raises(BuildError, match=r"cxx failed: x error: b\. Try another one with CXX\."):
        build.build()


def test_the_command_says_how_long_it_took(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([100.0, 102.5])
    monkeypatch.setattr(build, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(build, "build", lambda: Path("/there/é.so"))
    assert build.main() == 0
    assert capsys.readouterr().out == "CPU kernels: /there/é.so (compiled in 2.5 s)\n"


# ---- sampling ----


@needs_library
def test_likelihoods_of_what_is_not_in_the_logits_are_refused() -> None:
    """And of the first and the last token, and of none and of all, they are not."""
    assert LIBRARY is not None
    operations = cpu_operations(LIBRARY, torch_operations(torch.device("cpu"), torch.float32))
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    for tokens, counts in (([0, 39], [0, 40]), ([39, 0], [40, 0]), ([5, 7], [5, 6])):
        got = operations.logprobs(logits, tokens, counts)
        for one, wanted in zip(got, reference.logprobs(logits, tokens, counts), strict=True):
            assert (one.rank, one.best) == (wanted.rank, wanted.best)
            assert [one.logprob, *one.logprobs] == pytest.approx([wanted.logprob, *wanted.logprobs], abs=1e-5)
    for tokens in ([-1, 39], [39, -1], [40, 0], [0, 40]):
        with pytest.raises(ValueError, match="each must be 0 to 39"):
            operations.logprobs(logits, tokens, [1, 1])
    for counts in ([-1, 40], [40, -1], [41, 0], [0, 41]):
        with pytest.raises(ValueError, match="each must be 0 to 40"):
            operations.logprobs(logits, [1, 1], counts)
    assert operations.logprobs(logits[:0], [], []) == []
    for wrong in (logits[:1], logits[0], logits[None]):
        with pytest.raises(ValueError, match=r"need logits of shape \[2, V\]"):
            operations.logprobs(wrong, [1, 1], [1, 1])
    with pytest.raises(ValueError, match="need logits of shape"):
        operations.logprobs(logits, [1, 1], [1])


# ---- batch invariance ----


def test_what_to_do_where_nothing_is_batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError) as caught:
        create_operations(torch.device("cpu"), torch.float16, batch_invariant=True)
    assert caught.value.param == "--batch-invariant"
    assert caught.value.advice is not None
    assert caught.value.advice.startswith("Use --device cpu with --dtype float32 or bfloat16, or leave out")
    monkeypatch.setenv("PENSTOCK_CPU_KERNELS", "0")
    monkeypatch.setattr(library, "available", lambda _: None)
    with pytest.raises(StartupError, match="they are not available") as caught:
        create_operations(torch.device("cpu"), torch.float32, batch_invariant=True)
    assert caught.value.param == "--batch-invariant"
