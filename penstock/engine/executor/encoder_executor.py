"""Computes steps of encoders: whole prompts, of which nothing is kept but their tokens until they are pooled.

    Plan ─▶ whole prompts, one after the other ─▶ encoder ─▶ hidden [T, H] ─▶ Pooler ─▶ vectors

Blocks of a plan are places of requests (there is one for each that may be in a step), and no memory: keys and
values live in one layer's cache, which every layer of every step writes anew. A step that does not fit into
memory is computed in parts, down to single prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch

from penstock.core.cost import Coefficients
from penstock.core.errors import RequestFailed
from penstock.core.executor import Capacity, Failures, Items, Ticket
from penstock.core.plan import Failure, Outcome, Plan, PlanItem, StepResult
from penstock.core.pooling import Pooling
from penstock.core.request_spec import Prompt
from penstock.engine.clock import Clock, MonotonicClock
from penstock.engine.encoder_budget import BLOCK_SIZE
from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.kernels.transfer import on_device
from penstock.model.bert import Encoder
from penstock.model.pooler import Pooler

from .faults import computed
from .memory_limits import StepLimits
from .recovery import Recovery
from .stream import HostStream, Stream


@dataclass(frozen=True, slots=True)
class _Kept:
    """One admitted request."""

    prompt: Prompt
    pooling: Pooling


class EncoderExecutor:
    """One encoder on one device.

    Args:
        model, pooler: loaded together.
        cache: of one layer, for `blocks_needed`.
        attention: kernels for this cache.
        seats: most requests in a step.
        max_model_len: longest prompt.
        prior: what steps cost, roughly.
        clock, progress, stream: as TorchExecutor's.
    """

    def __init__(
        self,
        model: Encoder,
        pooler: Pooler,
        cache: KVCache,
        attention: AttentionBackend,
        *,
        seats: int,
        max_model_len: int,
        prior: Coefficients,
        clock: Clock | None = None,
        progress: Callable[[Items], None] | None = None,
        stream: Stream | None = None,
    ) -> None:
        self._model = model
        self._pooler = pooler
        self._cache = cache
        self._attention = attention
        self._capacity = Capacity(
            num_blocks=2 * seats,  # of two steps, and what admission keeps back
            block_size=max_model_len,
            vocab_size=model.config.vocab_size,
            prior=prior,
            features=frozenset({"pooling"}),
        )
        self._stream = stream or HostStream()
        self._kept: dict[str, _Kept] = {}
        self._failures = Failures()
        self.recovery = Recovery(self._compute, clock or MonotonicClock(), self.probe, progress)
        self.recovery.limits = StepLimits(whole=True)

    def capacity(self) -> Capacity:
        """A block is a place, for a prompt of any length."""
        return self._capacity

    def submit(self, plan: Plan) -> Ticket:
        """Compute the step."""
        for request in plan.released:
            self._kept.pop(request, None)
            self._failures.forget(request)
        for admission in plan.admitted:
            spec = admission.spec
            assert spec.pooling is not None  # the scheduler admits nothing else here
            self._kept[admission.request] = _Kept(admission.prompt, spec.pooling)
        stream = self._stream
        begin = stream.mark()
        outcomes, whole = self._failures.run(plan.items, partial(self.recovery.run, plan.step))
        end = stream.mark()
        stream.wait(end)
        seconds = stream.seconds(begin, end)
        return Ticket(plan.step, StepResult(plan.step, seconds, outcomes, regular=whole))

    def collect(self, ticket: Ticket) -> StepResult:
        """The step's result."""
        if not isinstance(ticket.payload, StepResult):
            raise TypeError(f"ticket {ticket} is not from this executor")
        return ticket.payload

    def close(self) -> None:
        """Drop requests and memory."""
        self._kept.clear()
        self._cache.layers.clear()

    def probe(self) -> None:
        """A prompt of a few tokens. Raises whatever the device raises, or RequestFailed where the model
        computes no numbers."""
        count = min(8, self._capacity.block_size)
        ids = tuple(index % self._capacity.vocab_size for index in range(count))
        pooling = self._pooler.plan.info.pooling()
        self._kept[_PROBE] = _Kept(Prompt(ids, 0), pooling)
        try:
            (outcome,) = self._compute((PlanItem(_PROBE, 0, 0, count, pools=True),))
            if outcome.failure is not None:
                raise RequestFailed(f"a test prompt of {count} tokens fails: {outcome.failure.cause}")
        finally:
            del self._kept[_PROBE]

    def _compute(self, items: Items) -> Sequence[Outcome]:
        """See recovery.Compute."""
        return computed(self._forward, items)

    @torch.inference_mode()
    def _forward(self, items: Items) -> Sequence[Outcome]:
        kept = [self._kept[item.request] for item in items]
        layout = StepLayout(_spans(items), BLOCK_SIZE, causal=False)
        ids = np.fromiter(chain.from_iterable(each.prompt.token_ids for each in kept), np.int64)
        hidden = self._model.forward(
            on_device(ids, self._model.device),
            on_device(layout.positions, self._model.device),
            self._attention.prepare(layout),
            self._cache,
            self._types(kept, layout),
        )
        outcomes = [_NOTHING] * len(items)
        starts = layout.query_starts
        for pooling in dict.fromkeys(each.pooling for each in kept):
            places = [place for place, each in enumerate(kept) if each.pooling == pooling]
            rows = hidden
            if len(places) < len(kept):
                rows = torch.cat([hidden[starts[place] : starts[place + 1]] for place in places])
            lengths = [items[place].tokens for place in places]
            tokens = [kept[place].prompt.token_ids for place in places]
            for place, vectors in zip(places, self._pooler(pooling, rows, lengths, tokens), strict=True):
                outcomes[place] = _NOT_FINITE if vectors is None else Outcome(pooled=vectors)
        return outcomes

    def _types(self, kept: Sequence[_Kept], layout: StepLayout) -> torch.Tensor | None:
        """Token types [T], where a prompt is of two texts."""
        if self._model.types < 2 or all(each.prompt.second is None for each in kept):
            return None
        types = np.zeros(layout.num_tokens, np.int64)
        for each, first, last in zip(kept, layout.query_starts, layout.query_starts[1:], strict=False):
            if each.prompt.second is not None:
                types[first + each.prompt.second : last] = 1
        return on_device(types, self._model.device)


_PROBE = ""
_NOTHING = Outcome()
_NOT_FINITE = Outcome(failure=Failure("the prompt's hidden states are not finite."))


def _spans(items: Items) -> list[Span]:
    """Blocks one after the other."""
    spans: list[Span] = []
    first = 0
    for item in items:
        count = -(-item.tokens // BLOCK_SIZE)
        spans.append(Span(item.start, item.tokens, range(first, first + count)))
        first += count
    return spans
