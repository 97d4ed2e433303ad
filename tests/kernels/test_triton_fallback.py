"""Which errors of Triton's kernels another table takes over from, and which it would only hide."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from penstock.kernels.triton.fallback import Fallback, is_compile_failure


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), True),
        (OSError("no space left on device"), True),
        (AssertionError("libcuda.so cannot found!\nPossible files are located at []"), True),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), True),
        (RuntimeError("Triton Error [CUDA]: a PTX JIT compilation failed"), True),
        (RuntimeError("Triton Error [CUDA]: named symbol not found"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (RuntimeError("Triton Error [HIP]:  Code: 719, Messsage: unspecified launch failure"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (MemoryError(), False),
        (AssertionError("a row has no blocks"), False),
        (ValueError("rows"), False),
    ],
)
def test_who_takes_over(error: Exception, ours: bool) -> None:
    assert is_compile_failure(error) is ours
    fallback = Fallback()

    def fast() -> str:
        raise error

    work = fallback(fast, lambda: "plain")
    if ours:
        assert work() == "plain"
    else:
        with pytest.raises(type(error)):
            work()
    assert fallback.failed is ours
