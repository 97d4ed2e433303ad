"""Numbers of the host on a device; what only a GPU can show is checked where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.kernels.transfer import on_device


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    tensor = on_device(array, torch.device("cpu"))
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2, 3, 4]
    assert on_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)])
def test_a_gpu_gets_them_and_the_host_does_not_wait(shape: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = (
            on_device(numbers, torch.device("cuda")),
            on_device(torch.from_numpy(numbers), torch.device("cuda")),
        )
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(np.array_equal(each.cpu().numpy(), numbers) for each in there)
