"""Blocks of the KV cache in the host's memory: copies of blocks, there and back, in the order of the steps.

    keys, values of a layer on the host: [host_blocks, kv_heads, block_size, head_dim]

As the device's (kernels.attention), so that a block is one piece of memory. Beside a GPU the memory is
pinned, which the device copies to and from by itself, while the host goes on: nothing here waits. Host blocks
that are next to each other are copied at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from penstock.core.plan import Copy
from penstock.kernels.attention import KVCache

from .cuda import pin, unpin
from .faults import is_out_of_memory
from .stream import Stream, column

logger = logging.getLogger("penstock.engine")


class HostCache:
    """Room for so many blocks.

    Args:
        cache: the device's.
        num_blocks: of the host.
        stream: the device's.
        pinned: whether the device copies by itself.
    """

    def __init__(self, cache: KVCache, num_blocks: int, stream: Stream, *, pinned: bool = False) -> None:
        spec = cache.spec
        self.num_blocks = num_blocks
        self._cache = cache
        self._stream = stream
        self._layers = [
            tuple(torch.empty((num_blocks, *part.shape[1:]), dtype=spec.dtype) for part in layer)
            for layer in cache.layers
        ]
        # not by torch's allocator of pinned memory: that takes powers of two, up to twice what was planned
        device = cache.layers[0][0].device
        self._pinned = [part for layer in self._layers for part in layer if pinned and pin(part, device)]
        if pinned and len(self._pinned) < 2 * len(self._layers):
            logger.warning(
                "the host's memory for preempted requests could not be pinned: the host waits for copies"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self._cache.spec.block_size * self._cache.spec.bytes_per_token

    def store(self, copies: Sequence[Copy]) -> None:
        """From the device: (its block, the host's)."""
        for first, blocks in _runs([(host, device) for device, host in copies]):
            index = self._stream.send(column(blocks))
            for here, there in self._pairs():
                try:
                    here[first : first + len(blocks)].copy_(there[index], non_blocking=True)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    for place, block in enumerate(blocks):  # slower, and takes nothing of the device
                        here[first + place].copy_(there[block], non_blocking=True)

    def load(self, copies: Sequence[Copy]) -> None:
        """To the device: (the host's block, its own)."""
        for first, blocks in _runs(copies):
            index = self._stream.send(column(blocks))
            for here, there in self._pairs():
                try:
                    some = here[first : first + len(blocks)].to(there.device, non_blocking=True)
                    there.index_copy_(0, index, some)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    for place, block in enumerate(blocks):
                        there[block].copy_(here[first + place], non_blocking=True)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(the host's, the device's) keys or values of each layer."""
        for kept, layer in zip(self._layers, self._cache.layers, strict=True):
            yield from zip(kept, layer, strict=True)

    def close(self) -> None:
        """Free the memory, when the device is done with it."""
        if self._pinned:
            with contextlib.suppress(RuntimeError):  # one that is lost copies nothing any more
                self._stream.wait(self._stream.mark())
        for part in self._pinned:
            unpin(part)
        self._pinned.clear()
        self._layers.clear()


#: Blocks that are copied at once, at most: as many have to exist twice on the device for a moment.
_MOST = 64


def _runs(copies: Sequence[Copy]) -> Iterator[tuple[int, list[int]]]:
    """(first host block, device blocks) of host blocks that follow each other."""
    first, device_blocks = -1, list[int]()
    for host, device in sorted(copies):
        if 0 < len(device_blocks) < _MOST and host == first + len(device_blocks):
            device_blocks.append(device)
            continue
        if device_blocks:
            yield first, device_blocks
        first, device_blocks = host, [device]
    if device_blocks:
        yield first, device_blocks
