"""Steps of decode as recorded graphs: one call of the device instead of a thousand.

    sizes    1   2   4   8  16 │ 24  32  48 … 256        rows of one step; a step takes the next larger graph
             before the engine │ in idle moments,
             is ready          │ one at a time           both from the largest down, which finds its memory
                                                         in what the larger one has left

A graph computes from the embedding to the logits, out of buffers that stay where they are. Before it is
replayed, they are filled: ids (on the device, where the step before has left them), positions, and what
attention must know (`ReservedStep.update`). Rows that the step has none for are padding. What has no graph
(prompts, mixed steps, sizes that are not captured yet) is computed call by call, with the same tokens.

What a graph is, is a device's business: `Capture` records work and gives something that does it again.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.core.errors import cause
from penstock.kernels.attention import (
    AttentionBackend,
    KVCache,
    ReservedStep,
    ReservingBackend,
    Span,
    StepLayout,
)
from penstock.model.causal_lm import CausalLM

from .faults import is_lost, lost

logger = logging.getLogger("penstock.engine")


class Recorded(Protocol):
    """Work that can be done again."""

    output: torch.Tensor
    """What the work computes; every replay writes it there."""

    def replay(self) -> None:
        """Do it again, with what its inputs hold now."""
        ...


Capture = Callable[[Callable[[], torch.Tensor]], Recorded]
"""Records some work, which is called for that, and once at least before."""


@dataclass(frozen=True, slots=True)
class _Graph:
    step: ReservedStep
    recorded: Recorded


class DecodeGraphs:
    """The graphs of one model on one device.

    Args:
        capture: how the device records.
        sizes: rows of the graphs to be.
        ready: those of them to be captured by `prepare`; the others come with `capture_next`.
        row_blocks: most blocks of one request.
        idle_block: a block of the cache that no plan has, for what is captured to write to.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        attention: AttentionBackend,
        capture: Capture,
        sizes: Sequence[int],
        ready: Sequence[int],
        row_blocks: int,
        idle_block: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._capture = capture
        self._row_blocks = row_blocks
        self._idle_block = idle_block
        first = set(ready)
        self._missing = sorted(first, reverse=True) + sorted(set(sizes) - first, reverse=True)
        self._ready = len(first)
        self._sizes: list[int] = []
        """Of the graphs that are there, ascending."""
        self._graphs: dict[int, _Graph] = {}
        rows = max(sizes)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=model.device)
        """Input of all graphs: token ids of a step's rows."""
        self.positions = torch.zeros(rows, dtype=torch.int64, device=model.device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of the graphs that are there."""
        return tuple(self._sizes)

    @property
    def missing(self) -> int:
        """How many are still to be captured."""
        return len(self._missing)

    def prepare(self) -> None:
        """Capture those that are wanted before anything is served."""
        started = time.perf_counter()
        for _ in range(self._ready):
            self.capture_next()
        if self._sizes:
            logger.info(
                "captured graphs of %s decoding requests in %.2f s; %d more when there is nothing else to do",
                ", ".join(map(str, self._sizes)),
                time.perf_counter() - started,
                len(self._missing),
            )

    def capture_next(self) -> bool:
        """Capture one more; False if there is none to be captured. Raises DeviceLost.

        Where the device cannot, the graphs that are there are kept, and no other is tried.
        """
        if not self._missing:
            return False
        size = self._missing.pop(0)
        try:
            graph = self._make(size)
        except Exception as error:
            if is_lost(error):
                raise lost(error) from error
            self._missing.clear()
            logger.warning(
                "no graph of %d decoding requests: %s; steps of more than %s are computed call by call",
                size,
                cause(_first(error)).splitlines()[0],
                max(self._sizes, default=0),
            )
            return False
        if graph is None:
            self._missing.clear()
            logger.info("attention's kernels cannot be captured: every step is computed call by call")
            return False
        self._graphs[size] = graph
        self._sizes.insert(bisect_left(self._sizes, size), size)
        return True

    def drop(self) -> None:
        """Forget all graphs, and capture none: what they have recorded is not so any more."""
        self._graphs.clear()
        self._sizes.clear()
        self._missing.clear()

    def size_for(self, rows: int) -> int | None:
        """Rows of the smallest graph that takes so many; None if there is none."""
        place = bisect_left(self._sizes, rows)
        return self._sizes[place] if place < len(self._sizes) else None

    def run(self, layout: StepLayout) -> torch.Tensor | None:
        """Logits [rows, V] of a step of decode whose ids and positions lie in the buffers; None if no graph
        takes it. They stay until the next run."""
        rows = layout.num_tokens
        size = self.size_for(rows)
        if size is None:
            return None
        graph = self._graphs[size]
        try:
            graph.step.update(layout)
        except ValueError:  # block tables longer than were reserved
            return None
        graph.recorded.replay()
        return graph.recorded.output[:rows]

    @torch.inference_mode()
    def _make(self, size: int) -> _Graph | None:
        """None where attention cannot be captured."""
        if not isinstance(self._attention, ReservingBackend):
            return None
        step = self._attention.reserve(size, size * self._row_blocks)
        if step is None:
            return None
        # one short row: that the work is recorded matters, not what it computes
        step.update(StepLayout([Span(0, 1, [self._idle_block])], self._cache.spec.block_size))
        self.positions.zero_()
        self.ids.zero_()
        model, cache = self._model, self._cache
        ids, positions = self.ids[:size], self.positions[:size]

        def work() -> torch.Tensor:
            return model.logits(model.forward(ids, positions, step, cache))

        return _Graph(step, self._capture(work))


def _first(error: Exception) -> Exception:
    """What has broken a capture, of which its end says only that something has."""
    before = error.__context__
    return (
        before if "previous error during capture" in str(error) and isinstance(before, Exception) else error
    )


def blocks_of(max_model_len: int, block_size: int) -> int:
    """Most blocks of one request."""
    return math.ceil(max_model_len / block_size)
