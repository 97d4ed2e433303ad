"""Weights on their way to a device that copies by itself: what it has not copied yet is not overwritten."""

from __future__ import annotations

import pytest
import torch

from penstock.model.staging import Staging

CPU = torch.device("cpu")


class Late:
    """A device whose copies happen when somebody waits for them, at the very end of what they may use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waits = 0
        real = torch.Tensor.copy_

        def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if non_blocking:
                self._queue.append((target, source))
                return target
            return real(target, source)

        self._real = real
        monkeypatch.setattr(torch.Tensor, "copy_", copy)

    def moment(self) -> Late._Moment:
        return Late._Moment(self, len(self._queue))

    def drain(self, count: int) -> None:
        for target, source in self._queue[:count]:
            self._real(target, source)
        self._queue[:count] = [(torch.empty(0), torch.empty(0))] * min(count, len(self._queue))

    class _Moment:
        def __init__(self, device: Late, count: int) -> None:
            self._device, self._count = device, count

        def synchronize(self) -> None:
            self._device.waits += 1
            self._device.drain(self._count)


@pytest.mark.parametrize("half", [16, 64, 1 << 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_arrive_whole(monkeypatch: pytest.MonkeyPatch, half: int, dtype: torch.dtype) -> None:
    shapes = ((7, 9), (1,), (0, 4), (64, 3), (130,))
    sent = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in shapes]
    sent.append(torch.arange(24.0).view(4, 6).t().to(dtype))  # not contiguous
    device = Late(monkeypatch)
    staging = Staging(CPU, half, pinned=False, moment=device.moment)
    out = [staging.send(tensor) for tensor in sent]
    device.drain(10_000)
    for there, here in zip(out, sent, strict=True):
        assert there.shape == here.shape
        assert torch.equal(there, here)
    pieces = sum(-(-tensor.nbytes // half) for tensor in sent)
    assert device.waits == max(0, pieces - 2)  # each half, but for its first use
