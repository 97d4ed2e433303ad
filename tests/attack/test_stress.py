"""A few hundred requests of the stress test; ten thousand by command: see stress.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from penstock.kernels.cpu.library import available

from .stress import Answer, compare, make_executor, stress

pytestmark = pytest.mark.skipif(
    available(wait_seconds=120) is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0"
)


@pytest.mark.parametrize(
    ("dtype", "quantization", "architecture"),
    [
        (torch.float32, None, "qwen3"),
        (torch.float32, None, "gpt-neox"),
        (torch.bfloat16, None, "qwen3"),
        (torch.bfloat16, "int8", "qwen3"),
        (torch.float32, "w8a8", "qwen3"),
        (torch.bfloat16, "int4", "qwen3"),
    ],
)
def test_healthy_requests_get_the_bytes_that_they_get_alone(
    dtype: torch.dtype,
    quantization: str | None,
    architecture: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beside ill ones, under priorities and preemption, with shared prefixes, greedy and with seeds."""
    caplog.set_level(logging.ERROR)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of steps that take microseconds, a second thread makes milliseconds
    try:
        found = stress(make_executor(tmp_path / "model", dtype, quantization, architecture), 60)
    finally:
        torch.set_num_threads(before)
    assert found["differ"] == 0, found
    assert found["ill_without_failure"] == 0
    assert found["healthy"] > 40
    assert found["preemptions"] > 0
    assert found["prefix_hit_tokens"] > 0


def test_a_difference_is_seen() -> None:
    found = compare(Answer([1, 2], [(1, -0.5, 1, ())]), Answer([1, 2], [(1, -0.50000006, 1, ())]))
    assert (found["differ"], found["differ_in_tokens"], found["differ_in_logprobs"]) == (1, 0, 1)
    found = compare(Answer([1, 2]), Answer([1], failure="logits contain NaN"))
    assert (found["differ"], found["differ_in_tokens"], found["failures_in_company_only"]) == (1, 1, 1)
    assert compare(Answer([1], failure="x"), Answer([1], failure="x"))["differ"] == 0
