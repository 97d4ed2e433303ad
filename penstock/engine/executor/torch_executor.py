"""Computes steps with torch, on a CPU or a CUDA device.

    Plan ─▶ rows ─▶ StepLayout ─▶ model ─▶ hidden [R, H] ─▶ logits of sampled rows ─▶ Sampler ─▶ tokens

R are the rows whose hidden states are needed: those that are sampled, and all of a prompt whose logprobs were
asked for.

It keeps one row per admitted request: token ids, block table, sampling parameters, seed. It does not decide
anything: which tokens, which blocks and who is sampled is the plan's.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from penstock.core.cost import Coefficients
from penstock.core.errors import DeviceOutOfMemory, cause
from penstock.core.plan import Admission, Plan, PlanItem, StepResult, TokenLogprob
from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.model.causal_lm import CausalLM
from penstock.sampling.logprobs import prompt_logprobs
from penstock.sampling.sampler import Sampler
from penstock.sampling.state import SamplingState

from .base import Capacity, Ticket
from .diagnosis import Diagnosis, finite_rows


@dataclass(slots=True)
class _Seat:
    """What the executor keeps of one request."""

    row: SamplingState
    blocks: array[int]


@dataclass(slots=True)
class _Wanted:
    """Which hidden states a step needs, and for what."""

    rows: list[int] = field(default_factory=list)
    """Flat rows, ascending."""
    sampled: list[tuple[PlanItem, int]] = field(default_factory=list)
    """Each with the index, in `rows`, of its last position."""
    prompts: list[tuple[PlanItem, int]] = field(default_factory=list)
    """Those that want logprobs of their prompts, each with the index of its first position."""


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
        self._sampler = Sampler(model.operations)
        self._diagnosis = Diagnosis(model, cache, attention)
        self._seats: dict[str, _Seat] = {}
        self._applied = -1
        self._extended: set[str] = set()
        """Requests whose blocks of the step applied last are in their tables."""

    def capacity(self) -> Capacity:
        """Sizes of the cache and the model."""
        return Capacity(
            num_blocks=self._num_blocks,
            block_size=self._cache.spec.block_size,
            vocab_size=self._model.config.vocab_size,
            prior=self._prior,
        )

    def submit(self, plan: Plan) -> Ticket:
        """Bring the rows up to date."""
        self._apply(plan)
        return Ticket(plan.step, plan.items)

    def collect(self, ticket: Ticket) -> StepResult:
        """Compute the step; nothing of it is kept if this raises."""
        try:
            return self._compute(ticket)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            what = cause(error).splitlines()[0]
        # not in the handler: the traceback holds the failed step's tensors, which a retry needs the place of
        raise DeviceOutOfMemory(what)

    @torch.inference_mode()
    def _compute(self, ticket: Ticket) -> StepResult:
        started = time.perf_counter()
        items: tuple[PlanItem, ...] = ticket.payload  # type: ignore[assignment]
        layout = StepLayout(
            [Span(item.start, item.tokens, self._seats[item.request].blocks) for item in items],
            self._cache.spec.block_size,
        )
        wanted = self._wanted(items, layout)
        hidden = self._model.forward(
            self._on_device(self._token_ids(items)),
            self._on_device(torch.from_numpy(layout.positions)),
            self._attention.prepare(layout),
            self._cache,
            wanted.rows,
        )
        prompt = self._prompt_logprobs(wanted.prompts, hidden)
        tokens, logprobs, errors, tainted = self._sample(wanted.sampled, hidden)
        for request, token in tokens.items():
            self._seats[request].row.tokens.append(token)
        return StepResult(
            step=ticket.step,
            seconds=time.perf_counter() - started,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt,
            errors=errors,
            tainted=tainted,
        )

    def close(self) -> None:
        """Drop rows and memory."""
        self._seats.clear()
        self._cache.layers.clear()

    def _apply(self, plan: Plan) -> None:
        if plan.step != self._applied:
            for request in plan.released:
                del self._seats[request]
            for admission in plan.admitted:
                self._seats[admission.request] = self._seat(admission)
            self._extended.clear()
            self._applied = plan.step
        for item in plan.items:
            if item.blocks and item.request not in self._extended:
                self._extended.add(item.request)
                self._seats[item.request].blocks.extend(item.blocks)

    def _seat(self, admission: Admission) -> _Seat:
        params = admission.params
        if len(admission.tokens) > admission.prompt_len:
            params = params.with_(prompt_logprobs=None)  # they were delivered before the preemption
        row = SamplingState(
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

    def _wanted(self, items: Sequence[PlanItem], layout: StepLayout) -> _Wanted:
        wanted = _Wanted()
        rows = wanted.rows
        for item, first, last in zip(items, layout.query_starts, layout.last_rows, strict=False):
            row = self._seats[item.request].row
            if row.params.prompt_logprobs is not None and item.start < row.prompt_len:
                wanted.prompts.append((item, len(rows)))
                rows.extend(range(first, last + 1))
            elif item.sample:
                rows.append(last)
            if item.sample:
                wanted.sampled.append((item, len(rows) - 1))
        return wanted

    def _sample(
        self, sampled: Sequence[tuple[PlanItem, int]], hidden: torch.Tensor
    ) -> tuple[dict[str, int], dict[str, TokenLogprob], dict[str, str], frozenset[str]]:
        """(tokens, logprobs, errors, those of the errors that are the model's) by request."""
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprob] = {}
        errors: dict[str, str] = {}
        failed: list[tuple[PlanItem, int]] = []
        if not sampled:
            return tokens, logprobs, errors, frozenset()
        last = hidden
        if len(sampled) < len(hidden):
            last = hidden.index_select(0, self._on_device(torch.tensor([row for _, row in sampled])))
        logits = self._model.logits(last)
        rows = [self._seats[item.request].row for item, _ in sampled]
        for at, row, choice in zip(sampled, rows, self._sampler.sample(logits, rows), strict=True):
            if choice.error is not None:
                errors[row.request] = choice.error
                failed.append(at)
                continue
            tokens[row.request] = choice.token
            if choice.logprob is not None:
                logprobs[row.request] = choice.logprob
        return tokens, logprobs, errors, self._examine(failed, hidden) if failed else frozenset()

    def _examine(self, failed: Sequence[tuple[PlanItem, int]], hidden: torch.Tensor) -> frozenset[str]:
        """Which of the items (each with the row of its last state) the model gave logits that are not finite,
        whatever the request asked for; the log says where they come from."""
        rows = self._on_device(torch.tensor([row for _, row in failed]))
        finite = finite_rows(self._model.logits(hidden.index_select(0, rows)))
        broken = [item for (item, _), fine in zip(failed, finite, strict=True) if not fine]
        for item in broken:
            span = Span(item.start, item.tokens, self._seats[item.request].blocks)
            self._diagnosis.report(item.request, self._on_device(self._token_ids([item])), span)
        return frozenset(item.request for item in broken)

    def _prompt_logprobs(
        self, prompts: Sequence[tuple[PlanItem, int]], hidden: torch.Tensor
    ) -> dict[str, tuple[TokenLogprob, ...]]:
        """Of the prompt tokens that follow this step's positions."""
        result: dict[str, tuple[TokenLogprob, ...]] = {}
        for item, first in prompts:
            row = self._seats[item.request].row
            targets = row.tokens[item.start + 1 : min(item.start + item.tokens + 1, row.prompt_len)]
            rows: list[TokenLogprob] = []
            for begin in range(0, len(targets), _LOGITS_ROWS):
                some = targets[begin : begin + _LOGITS_ROWS]
                logits = self._model.logits(hidden[first + begin : first + begin + len(some)])
                count = row.params.prompt_logprobs or 0
                rows.extend(prompt_logprobs(self._model.operations, logits, some, count))
            result[item.request] = tuple(rows)
        return result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory ran out. torch's CPU allocator, oneDNN and CUDA's libraries
    have no class of their own for it, so their words are looked at."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        text in _ONEDNN_OUT_OF_MEMORY or any(words in text for words in _OUT_OF_MEMORY)
    )


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "_ALLOC_FAILED")
#: All that oneDNN says when there is no memory for its code or scratchpad. (What it has no implementation for
#: fails one stage earlier, with "could not create a primitive descriptor …".)
_ONEDNN_OUT_OF_MEMORY = ("could not create a primitive", "could not create a memory object")

#: Rows of prompt logits that exist at one time: 128 rows of a 150k vocabulary are 38 MB in bfloat16.
_LOGITS_ROWS = 128
