"""Steps that are queued before the host has seen the tokens of the step before: they stay on the device.

    host      plan n ─ queue n ─ plan n+1 ─ queue n+1 ─ read n ─ commit n ─ plan n+2 …
    device             [ step n ............ ][ step n+1 ............ ][ step n+2
    last[slot]                      tokens ▲──▶ input ids ... tokens ▲──▶

Each request that is sampled has a slot in one small tensor of the device. A step writes what it samples
there, and the next one takes its input ids from there; to the host they come when somebody collects. All else
that a step needs is known ahead, for it hangs on how many tokens there are and not on which.

Not every step can be queued so: what the host must see or compute between two tokens (penalties over the
tokens so far, log-probabilities, drafts, vectors, logprobs of prompts) is computed by the executor at once,
when all before it is settled.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.executor import Items
from penstock.core.plan import PlanItem
from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.model.causal_lm import CausalLM
from penstock.sampling.sampler import Sampler
from penstock.sampling.state import SamplingState

from .graphs import DecodeGraphs
from .kept import Kept, Wanted
from .stream import Fetched, Stream, column


@dataclass(slots=True)
class Queued:
    """A step on its way."""

    items: Items
    kept: list[Kept]
    """One for each item, whoever has its name meanwhile."""
    sampled: list[int]
    """Places of those that are sampled."""
    fetched: Fetched | None
    """float64 [2, sampled]: tokens, and whether each is one (finite)."""

    def answers(self) -> Iterator[tuple[PlanItem, Kept, int | None]]:
        """(item, its request, its token, or None where nothing was sampled or there was nothing to choose
        from). To be asked once, when the step is done: whoever was sampled has one token pending less."""
        tokens: dict[int, int] = {}
        if self.fetched is not None:
            chosen, checks = self.fetched.numpy().tolist()
            for place, token, check in zip(self.sampled, chosen, checks, strict=True):
                state = self.kept[place].state
                assert state is not None
                state.pending -= 1
                if math.isfinite(check):
                    tokens[place] = int(token)
        for place, (item, kept) in enumerate(zip(self.items, self.kept, strict=True)):
            yield item, kept, tokens.get(place)


class Ahead:
    """Queues steps on one device.

    Args:
        slots: requests that may be sampled at one time; more are made when they are needed.

    Attributes:
        graphs: what steps of decode are replayed from, where the device records.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        attention: AttentionBackend,
        stream: Stream,
        sampler: Sampler,
        slots: int = 256,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._stream = stream
        self._sampler = sampler
        self._last = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._free = list(range(slots - 1, -1, -1))
        self.graphs: DecodeGraphs | None = None

    def takes(self, items: Items, kept: Sequence[Kept]) -> bool:
        """Whether a step can be queued: nothing in it waits for the host."""
        return (
            self._stream.asynchronous
            and not self._sampler.waits
            and all(
                _plain(item.samples, each) and not item.drafts and not item.pools
                for item, each in zip(items, kept, strict=True)
            )
        )

    @torch.inference_mode()
    def queue(self, items: Items, kept: list[Kept]) -> Queued:
        """Start a step that `takes` has said yes to. Raises what the device raises, and has then changed
        nothing that the host can see."""
        layout = StepLayout(
            [Span(item.start, item.tokens, each.blocks) for item, each in zip(items, kept, strict=True)],
            self._cache.spec.block_size,
        )
        wanted = Wanted.of(items, kept, layout)
        sampled = [place for place, _ in wanted.sampled]
        states: list[SamplingState] = []
        for place in sampled:
            state = kept[place].state
            assert state is not None  # the plan samples none that has nothing to be sampled by
            states.append(state)
            self._give_slot(kept[place])
        ids = self._token_ids(items, kept, layout)
        logits = self._replay(layout, ids) if len(states) == layout.num_tokens else None
        if logits is None:
            positions = self._stream.send(layout.positions)
            hidden = self._model.forward(
                ids, positions, self._attention.prepare(layout), self._cache, wanted.rows
            )
            logits = self._model.logits(hidden) if states else None
        fetched = None
        if logits is not None:
            fetched = self._answer(logits, states, [kept[place] for place in sampled])
        for state in states:
            state.pending += 1
        return Queued(items, kept, sampled, fetched)

    def release(self, kept: Kept) -> None:
        """It is let go. Its slot may be another's at once: the device does things in order."""
        if kept.slot is not None:
            self._free.append(kept.slot)
            kept.slot = None

    def _token_ids(self, items: Items, kept: Sequence[Kept], layout: StepLayout) -> torch.Tensor:
        """int64 [T] on the device."""
        ids, rows, slots = _ids(items, kept, layout)
        send = self._stream.send
        if not rows:
            return send(ids)
        last = self._last[send(column(slots))]  # what the step before has sampled
        return last if len(rows) == len(ids) else send(ids).index_copy_(0, send(column(rows)), last)

    def _replay(self, layout: StepLayout, ids: torch.Tensor) -> torch.Tensor | None:
        """Logits of a step in which everybody decodes, where there is a graph for it."""
        graphs, rows = self.graphs, layout.num_tokens
        if graphs is None or graphs.size_for(rows) is None:
            return None
        graphs.ids[:rows].copy_(ids)
        graphs.positions[:rows].copy_(self._stream.send(layout.positions))
        return graphs.run(layout)

    def _answer(self, logits: torch.Tensor, states: Sequence[SamplingState], kept: Sequence[Kept]) -> Fetched:
        tokens, checks = self._sampler.draw(logits, states)
        slots = self._stream.send(column([each.slot for each in kept if each.slot is not None]))
        # a row without a distribution has a meaningless token, and the next step must not fall over it
        self._last.index_copy_(0, slots, tokens.clamp(0, logits.shape[1] - 1))
        return self._stream.fetch(torch.stack([tokens.double(), checks.double()]))

    def _give_slot(self, kept: Kept) -> None:
        if kept.slot is not None:
            return
        if not self._free:
            count = len(self._last)
            self._last = torch.cat([self._last, torch.zeros_like(self._last)])
            self._free.extend(range(2 * count - 1, count - 1, -1))
        kept.slot = self._free.pop()


def _plain(samples: int, kept: Kept) -> bool:
    """Whether nothing of a request is the host's business."""
    if kept.prompt_logprobs is not None or samples > 1:
        return False
    return not samples or (kept.state is not None and not kept.state.waits)


def _ids(
    items: Items, kept: Sequence[Kept], layout: StepLayout
) -> tuple[npt.NDArray[np.int64], list[int], list[int]]:
    """(ids that the host knows, int64 [T]; rows whose ids it does not know; slots where those are)."""
    flat = array("q")
    rows: list[int] = []
    slots: list[int] = []
    for item, each, last in zip(items, kept, layout.last_rows, strict=True):
        end = item.start + item.tokens
        if end > len(each.tokens):  # the last one, and it is the last one sampled
            assert each.slot is not None
            rows.append(last)
            slots.append(each.slot)
            flat.extend(each.tokens[item.start :])
            flat.append(0)
        elif item.tokens == 1:
            flat.append(each.tokens[item.start])
        else:
            flat.extend(each.tokens[item.start : end])
    return np.array(flat, np.int64), rows, slots
