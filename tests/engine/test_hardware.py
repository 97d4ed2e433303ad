"""Hardware: limits of control groups, and the roofline as words and as a cost model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from penstock.core.plan import Plan, PlanItem
from penstock.engine.hardware import Hardware, inspect_hardware, prior, roofline
from penstock.engine.machine import memory, usable_cores

MACHINE = Hardware(
    device="cpu",
    name="a processor",
    threads=2,
    isa="AVX2",
    memory_bytes=16 << 30,
    available_bytes=8 << 30,
    bandwidth=30e9,
    flops=400e9,
)


def test_the_roofline_is_bandwidth_over_weights_and_rate_over_parameters() -> None:
    text = roofline(MACHINE, weight_bytes=1_200_000_000, parameters=600_000_000)
    assert "at best 25 tok/s for one request" in text
    assert "333 tok/s of prompts" in text


def test_the_prior_predicts_the_roofline() -> None:
    costs = prior(MACHINE, 1_200_000_000, 600_000_000, 100_000)
    assert costs.fixed == pytest.approx(0.04, rel=0.05)
    assert costs.per_token * 1000 == pytest.approx(3.0, rel=0.01)
    assert costs.per_context == pytest.approx(100_000 / 30e9)
    assert Plan(0, items=(PlanItem("a", 0, 0, 1),)).tokens == 1


def test_this_machine_is_described_and_measured() -> None:
    found = inspect_hardware(torch.device("cpu"), torch.float32)
    assert found.bandwidth > 0
    assert found.flops > 0
    assert 0 < found.available_bytes <= found.memory_bytes
    assert found.name in found.describe()


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_cores_within_the_quota(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    """A container with a quota of 1.5 cores on a node of 64 is not to start 64 threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    def read_text(self: Path) -> str:
        if str(self) == "/sys/fs/cgroup/cpu.max":
            return quota
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert usable_cores() == cores


def test_two_threads_of_a_core_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight logical processors on four cores, of which six may be used: all of three cores, say."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 4, 5, 6})

    def read_text(self: Path) -> str:
        if "topology" not in str(self):
            raise FileNotFoundError(self)
        number = int(str(self).split("/cpu")[-1].split("/")[0]) % 4
        return f"{number},{number + 4}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert usable_cores() == 3


def test_files_in_the_page_cache_do_not_count_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 15000000 kB\n",
        "/sys/fs/cgroup/memory.max": str(8 << 30),
        "/sys/fs/cgroup/memory.current": str(6 << 30),
        "/sys/fs/cgroup/memory.stat": f"anon 100\ninactive_file {5 << 30}\n",
    }

    def read_text(self: Path, *args: object, **kwargs: object) -> str:
        if str(self) not in files:
            raise FileNotFoundError(self)
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory() == (8 << 30, 7 << 30)
