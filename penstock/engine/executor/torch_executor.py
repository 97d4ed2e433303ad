"""Computes steps with torch, on a CPU or a CUDA device, in plain torch operations.

    Plan ─▶ rows ─▶ StepLayout ─▶ model ─▶ hidden [T, H] ─▶ logits of sampled rows ─▶ Sampler ─▶ tokens

It keeps one row per admitted request: token ids, block table, sampling parameters, seed. It does not decide
anything: which tokens, which blocks and who is sampled is the plan's.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.cost import Coefficients
from penstock.core.plan import Admission, Plan, PlanItem, StepResult, TokenLogprob
from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.model.causal_lm import CausalLM
from penstock.sampling.logprobs import prompt_logprobs
from penstock.sampling.rows import Row
from penstock.sampling.sampler import Sampler

from .base import Capacity, Ticket


@dataclass(slots=True)
class _Seat:
    """What the executor keeps of one request."""

    row: Row
    blocks: array[int]


class TorchExecutor:
    """One model on one device.

    Args:
        model: the loaded model.
        cache: its KV cache.
        attention: kernels for this cache.
        prior: what steps cost, roughly.
        num_blocks: blocks to offer, if fewer than the cache has.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        attention: AttentionBackend,
        device: torch.device,
        prior: Coefficients,
        num_blocks: int | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._device = device
        self._prior = prior
        self._num_blocks = cache.num_blocks if num_blocks is None else num_blocks
        self._sampler = Sampler()
        self._seats: dict[str, _Seat] = {}
        self._applied = -1

    def capacity(self) -> Capacity:
        """Sizes of the cache and the model."""
        return Capacity(
            num_blocks=self._num_blocks,
            block_size=self._cache.spec.block_size,
            vocab_size=self._model.config.vocab_size,
            prior=self._prior,
        )

    def submit(self, plan: Plan) -> Ticket:
        """Bring the rows up to date. A part of the plan submitted last changes no row."""
        if plan.step != self._applied:
            self._apply(plan)
        return Ticket(plan.step, plan.items)

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> StepResult:
        """Compute the step; nothing of it is kept if this raises."""
        started = time.perf_counter()
        items: tuple[PlanItem, ...] = ticket.payload  # type: ignore[assignment]
        layout = StepLayout(
            [Span(item.start, item.tokens, self._seats[item.request].blocks) for item in items],
            self._cache.spec.block_size,
        )
        hidden = self._model.forward(
            self._on_device(self._token_ids(items)),
            self._on_device(torch.from_numpy(layout.positions)),
            self._attention.prepare(layout),
            self._cache,
        )
        prompt = self._prompt_logprobs(items, layout, hidden)
        tokens, logprobs, errors = self._sample(items, layout, hidden)
        for request, token in tokens.items():
            self._seats[request].row.tokens.append(token)
        return StepResult(
            step=ticket.step,
            seconds=time.perf_counter() - started,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt,
            errors=errors,
        )

    def close(self) -> None:
        """Drop rows and memory."""
        self._seats.clear()
        self._cache.layers.clear()

    def _apply(self, plan: Plan) -> None:
        for request in plan.released:
            del self._seats[request]
        for admission in plan.admitted:
            self._seats[admission.request] = self._seat(admission)
        for item in plan.items:
            self._seats[item.request].blocks.extend(item.blocks)
        self._applied = plan.step

    def _seat(self, admission: Admission) -> _Seat:
        params = admission.params
        if len(admission.tokens) > admission.prompt_len:
            params = params.with_(prompt_logprobs=None)  # they were delivered before the preemption
        row = Row(
            request=admission.request,
            params=params,
            prompt_len=admission.prompt_len,
            tokens=list(admission.tokens),
            eos_ids=admission.eos_ids,
            seed=params.seed or 0,
        )
        return _Seat(row, array("q"))

    def _token_ids(self, items: Sequence[PlanItem]) -> torch.Tensor:
        flat = array("q")
        for item in items:
            tokens = self._seats[item.request].row.tokens
            if item.tokens == 1:
                flat.append(tokens[item.start])
            else:
                flat.extend(tokens[item.start : item.start + item.tokens])
        return torch.from_numpy(np.frombuffer(flat, np.int64))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)

    def _sample(
        self, items: Sequence[PlanItem], layout: StepLayout, hidden: torch.Tensor
    ) -> tuple[dict[str, int], dict[str, TokenLogprob], dict[str, str]]:
        sampled = [(item, row) for item, row in zip(items, layout.last_rows, strict=True) if item.sample]
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprob] = {}
        errors: dict[str, str] = {}
        if not sampled:
            return tokens, logprobs, errors
        last = self._on_device(torch.tensor([row for _, row in sampled]))
        logits = self._model.logits(hidden.index_select(0, last))
        rows = [self._seats[item.request].row for item, _ in sampled]
        for row, choice in zip(rows, self._sampler.sample(logits, rows), strict=True):
            if choice.error is not None:
                errors[row.request] = choice.error
                continue
            tokens[row.request] = choice.token
            if choice.logprob is not None:
                logprobs[row.request] = choice.logprob
        return tokens, logprobs, errors

    def _prompt_logprobs(
        self, items: Sequence[PlanItem], layout: StepLayout, hidden: torch.Tensor
    ) -> dict[str, tuple[TokenLogprob, ...]]:
        """Of the prompt tokens that follow this step's positions, for requests that ask."""
        result: dict[str, tuple[TokenLogprob, ...]] = {}
        for item, first in zip(items, layout.query_starts, strict=False):
            row = self._seats[item.request].row
            count = row.params.prompt_logprobs
            if count is None or item.start >= row.prompt_len:
                continue
            targets = row.tokens[item.start + 1 : min(item.start + item.tokens + 1, row.prompt_len)]
            parts: list[TokenLogprob] = []
            for begin in range(0, len(targets), _LOGITS_ROWS):
                some = targets[begin : begin + _LOGITS_ROWS]
                logits = self._model.logits(hidden[first + begin : first + begin + len(some)])
                parts.extend(prompt_logprobs(logits, some, count))
            result[item.request] = tuple(parts)
        return result


#: Rows of prompt logits that exist at one time: 128 rows of a 150k vocabulary are 78 MB.
_LOGITS_ROWS = 128
