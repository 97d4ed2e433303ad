"""Says in the log where in the model a request's numbers stopped being finite.

The request's part of the step is computed again, alone, with every part's output checked. Its keys and values
are written once more, to its own places of the cache, with the same content up to rounding. That is safe
while the step is not yet committed: the blocks still belong to the request, and because it fails, the
scheduler makes everybody who shares one of those that are written start over (`Scheduler._fail`). Blocks
filled by earlier steps are only read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.model.causal_lm import CausalLM

logger = logging.getLogger("penstock.engine")

_EVERY = 60.0
"""Seconds between two diagnoses: each costs a step, and a broken model fails every request."""


class Diagnosis:
    """Explains logits that are not finite, once a minute.

    Args:
        model: computes.
        cache: the model's KV cache.
        attention: kernels for it.
        clock: seconds.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        attention: AttentionBackend,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._clock = clock
        self._last: float | None = None

    def report(self, request: str, token_ids: torch.Tensor, span: Span) -> None:
        """Log one warning.

        Args:
            request: its id.
            token_ids: int64 [T] on the model's device, the tokens of the span.
            span: what was computed of the request in this step.
        """
        last = span.start + span.tokens - 1
        now = self._clock()
        if self._last is not None and now - self._last < _EVERY:
            logger.warning(
                "request %s: logits at position %d are not finite (not examined: one was %.0f s ago)",
                request,
                last,
                now - self._last,
            )
            return
        self._last = now
        try:
            where = self._locate(token_ids, span)
        except Exception as error:  # the request has failed already; there is nothing else to lose
            where = f"where could not be found out: {type(error).__name__}: {error}"
        logger.warning("request %s: logits at position %d are not finite; %s", request, last, where)

    def _locate(self, token_ids: torch.Tensor, span: Span) -> str:
        earlier = self._earlier(span)
        layout = StepLayout([span], self._cache.spec.block_size)
        found = self._model.find_non_finite(
            token_ids,
            torch.from_numpy(layout.positions).to(token_ids.device),
            self._attention.prepare(layout),
            self._cache,
        )
        if found is None:
            where = "computed again alone they are: suspect the hardware, or a kernel for this batch's shape"
        else:
            where = f"first in the output of {found.part}: {found.value} at position {span.start + found.row}"
        return where + earlier

    def _earlier(self, span: Span) -> str:
        """Whether an earlier step has left keys or values that are not finite, and the first of them."""
        size = self._cache.spec.block_size
        blocks = list(span.blocks[: -(-span.start // size)])
        if not blocks:
            return ""
        for number, layer in enumerate(self._cache.layers):
            for name, cached in zip(("keys", "values"), layer, strict=True):
                index = torch.tensor(blocks, device=cached.device)
                # [blocks, KVH, size, D] → [positions]
                fine = cached[index].isfinite().all(-1).all(1).reshape(-1)[: span.start]
                if not bool(fine.all()):
                    position = int(fine.to(torch.uint8).argmin())
                    return (
                        f"; an earlier step had left {name} that are not finite, first in layer {number} at "
                        f"position {position}"
                    )
        return ""


def finite_rows(logits: torch.Tensor) -> Sequence[bool]:
    """Of each row [R, V]: whether all of its logits are finite."""
    rows: list[bool] = logits.isfinite().all(-1).tolist()
    return rows
