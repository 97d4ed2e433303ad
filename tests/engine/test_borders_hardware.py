"""What is read of a machine: memory within its control groups, cores, instructions, measured rates."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.engine import hardware
from penstock.engine.clock import MonotonicClock
from penstock.engine.environment import prepare
from penstock.engine.hardware import choose_device, cpu_isa, cpu_name, prior, roofline
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.machine import memory, usable_cores

from .test_hardware import MACHINE

GIB = 1 << 30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 12582912 kB\nHugePages_Total: 0\n"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The only files that there are."""
    known: dict[str, str] = {"/proc/meminfo": MEMINFO}

    def read_text(self: Path, *args: object, **kwargs: object) -> str:
        if str(self) not in known:
            raise FileNotFoundError(self)
        return known[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return known


# ---- memory ----

GROUP = "/sys/fs/cgroup/"


def test_without_a_control_group_all_of_it_counts(files: dict[str, str]) -> None:
    assert memory() == (16 * GIB, 12 * GIB)
    files[GROUP + "memory.max"] = "max\n"
    files[GROUP + "memory.current"] = "5\n"
    assert memory() == (16 * GIB, 12 * GIB)
    files[GROUP + "memory.max"] = str(16 * GIB)  # as much as there is: no limit
    assert memory() == (16 * GIB, 12 * GIB)


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
@pytest.mark.parametrize(
    ("limit", "used", "cache", "available"),
    [(8, 6, 0, 2), (8, 6, 5, 7), (15, 1, 0, 12), (8, 9, 0, 0), (8, 9, 3, 2)],
)
def test_within_a_control_group(
    files: dict[str, str], names: tuple[str, str], limit: int, used: int, cache: int, available: int
) -> None:
    files[GROUP + names[0]] = f"{limit * GIB}\n"
    files[GROUP + names[1]] = f"{used * GIB}\n"
    assert memory() == (limit * GIB, min(12, max(0, limit - used)) * GIB)
    files[GROUP + "memory.stat"] = f"active_file 7\ninactive_file {cache * GIB}\nunevictable 3\n"
    assert memory() == (limit * GIB, available * GIB)


def test_the_tighter_of_two_limits_holds(files: dict[str, str]) -> None:
    for folder, names, limit in (
        ("", ("memory.max", "memory.current"), 8),
        ("memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes"), 4),
    ):
        files[GROUP + folder + names[0]] = str(limit * GIB)
        files[GROUP + folder + names[1]] = str(GIB)
    assert memory() == (4 * GIB, 3 * GIB)


# ---- the processor ----

CPUINFO = "processor\t: 0\nmodel name\t: A Processor: 3 GHz\nflags\t\t: fpu avx2 avx512f\nbogomips\t: 1\n"


def test_a_processor_has_the_kernels_name_and_instructions(files: dict[str, str]) -> None:
    files["/proc/cpuinfo"] = CPUINFO
    assert cpu_name() == "A Processor: 3 GHz"
    assert cpu_isa() == "AVX512 AVX2"
    all_of_them = "avx2 avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 avx512_vnnix"
    files["/proc/cpuinfo"] = f"flags : {all_of_them}\n"
    assert cpu_isa() == "AMX-BF16 AMX-INT8 AVX512-BF16 AVX512-VNNI AVX512 AVX2"
    for other in ("flags : fpu sse2\n", "Features : asimd\n"):
        files["/proc/cpuinfo"] = other
        assert cpu_isa() == platform.machine()
        assert cpu_name() == (platform.processor() or platform.machine())
    del files["/proc/cpuinfo"]
    assert cpu_isa() == platform.machine()
    assert cpu_name() == (platform.processor() or platform.machine())


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("100000 100000", 1),
        ("100001 100000", 2),
        ("99999 100000", 1),
        ("1 100000", 1),
        ("200000 50000", 4),
        ("900000 100000", 6),
        ("max 100000", 6),
        ("", 6),
    ],
)
def test_a_quota_rounds_up_to_cores(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5, 7, 9, 11})
    assert usable_cores() == 6
    files[GROUP + "cpu.max"] = quota
    assert usable_cores() == cores


# ---- devices ----


def test_a_device_is_what_was_asked_for_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == ("cuda" if there else "cpu")
        assert choose_device("cpu").type == "cpu"
        if there:
            assert choose_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartupError, match="--device cuda: torch sees no CUDA device") as caught:
        choose_device("cuda")
    assert caught.value.param == "--device"
    assert "use --device cpu" in caught.value.advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(StartupError, match="torch sees no CUDA device: CUDA_VISIBLE_DEVICES is '7'"):
        choose_device("cuda")


def test_a_machine_in_one_line() -> None:
    assert MACHINE.describe() == (
        "a processor, 2 threads, AVX2; 8.0 of 16.0 GiB free; measured 30.0 GB/s, 400 GFLOP/s"
    )
    gpu = dataclasses.replace(MACHINE, device="cuda", name="a GPU", threads=0, isa="9.0", flops=4e14)
    assert gpu.describe() == "a GPU; 8.0 of 16.0 GiB free; measured 30.0 GB/s, 400,000 GFLOP/s"


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 4 * GIB))
    monkeypatch.setattr(hardware, "_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(hardware, "_flops", lambda device, dtype: 2.0)
    found = hardware.inspect_hardware(torch.device("cuda"), torch.bfloat16)
    assert (found.device, found.name, found.threads, found.isa) == (
        "cuda",
        "a GPU",
        0,
        "compute capability 9.0",
    )
    assert (found.memory_bytes, found.available_bytes) == (4 * GIB, 3 * GIB)
    assert (found.bandwidth, found.flops) == (1.0, 2.0)


def test_a_processor_is_described_by_the_kernel(files: dict[str, str], monkeypatch: Any) -> None:
    files["/proc/cpuinfo"] = CPUINFO
    monkeypatch.setattr(hardware, "_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(hardware, "_flops", lambda device, dtype: 2.0)
    found = hardware.inspect_hardware(torch.device("cpu"), torch.bfloat16)
    assert (found.device, found.name, found.isa) == ("cpu", "A Processor: 3 GHz", "AVX512 AVX2")
    assert found.threads == torch.get_num_threads()
    assert (found.memory_bytes, found.available_bytes) == (16 * GIB, 12 * GIB)


# ---- rates ----


def test_rates_are_of_the_fastest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run warms up; a slow one in between says nothing of the machine."""
    times = iter([0.0, 9.0, 10.0, 10.5, 11.0, 13.0, 14.0, 15.0])
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    runs: list[int] = []
    assert hardware._fastest(lambda: runs.append(1), torch.device("cpu")) == 0.5
    assert len(runs) == 4
    assert next(times, None) is None


def test_what_was_read_and_multiplied_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def fastest(work: Any, device: torch.device) -> float:
        done.append(work())
        return 0.25

    monkeypatch.setattr(hardware, "_fastest", fastest)
    cpu = torch.device("cpu")
    bytes_read = hardware._bandwidth(cpu) * 0.25
    assert bytes_read == 4 * done[0].item(), "a sum of ones, of four bytes each"
    assert 190e6 < bytes_read < 210e6, "several times as much as caches have"
    operations = hardware._flops(cpu, torch.bfloat16) * 0.25
    product = done[1]
    assert product.dtype == torch.bfloat16
    rows, columns = product.shape
    assert operations == 2 * rows * columns * product[0, 0].item()


def test_the_prior_grows_with_what_is_read_and_computed() -> None:
    costs = prior(MACHINE, 30_000_000_000, 200_000_000_000, 30_000)
    assert costs.fixed == pytest.approx(1.001)
    assert costs.per_token == pytest.approx(1.000001)
    assert costs.per_context == pytest.approx(1e-6 + 1e-12)
    assert costs.per_sample == pytest.approx(2e-5)
    twice = prior(dataclasses.replace(MACHINE, bandwidth=60e9, flops=800e9), 30 * 10**9, 2 * 10**11, 30_000)
    assert twice.fixed == pytest.approx(0.501)
    assert twice.per_token == pytest.approx(0.500001)
    assert "(30.0 GB/s over 1.20 GB of weights)" in roofline(MACHINE, 1_200_000_000, 600_000_000)


# ---- the process ----


def test_what_the_user_has_set_stands() -> None:
    bare: dict[str, str] = {}
    prepare(bare)
    assert bare == {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
    own = {"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "7"}
    prepare(own, threads=3)
    assert own == {
        "THP_MEM_ALLOC_ENABLE": "0",
        "GOMP_SPINCOUNT": "5",
        "KMP_BLOCKTIME": "1",
        "OMP_NUM_THREADS": "3",
    }
    waits = {"OMP_WAIT_POLICY": "passive"}
    prepare(waits)
    assert waits == {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}


def test_a_heartbeat_is_read_through_another_mapping(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    mine = Heartbeat(path, create=True)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        Heartbeat(path, create=True)
    theirs = Heartbeat(path)
    assert mine.read() == (0.0, 0.0, 0.0, 0.0)
    theirs.begin(5.0, 0.25)
    assert mine.read() == (5.0, 5.0, 0.25, 0.0)
    theirs.begin(6.0, 0.5)
    theirs.end(7.0)
    assert mine.read() == (7.0, 0.0, 0.0, 1.0)
    theirs.begin(8.0, 0.125)
    theirs.end(9.0)
    assert mine.read() == (9.0, 0.0, 0.0, 2.0)
    mine.close()
    theirs.close()
    with pytest.raises(ValueError, match="closed"):
        mine.read()


def test_a_step_does_not_move_the_real_clock() -> None:
    real = MonotonicClock()
    before = real.now()
    real.spent(1e9)
    assert before <= real.now() < before + 1e9


@pytest.mark.parametrize(
    ("isa", "dtype", "measured"),
    [
        ("AVX2", torch.bfloat16, torch.float32),
        ("AVX512 AVX2", torch.bfloat16, torch.float32),
        ("AVX512-BF16 AVX512 AVX2", torch.bfloat16, torch.bfloat16),
        ("aarch64", torch.bfloat16, torch.bfloat16),
        ("compute capability 8.0", torch.bfloat16, torch.bfloat16),
        ("AVX2", torch.float16, torch.float16),
    ],
)
def test_products_are_measured_in_what_the_kernels_compute_in(
    isa: str, dtype: torch.dtype, measured: torch.dtype
) -> None:
    assert hardware.multiplied_in(isa, dtype) == measured
