"""Computes steps with torch, on a CPU or a CUDA device.

    Plan ─▶ kept requests ─▶ StepLayout ─▶ model ─▶ hidden [R, H] ─┬─▶ logits of sampled rows ─▶ Sampler
                                                                    ├─▶ logits of prompts' rows ─▶ logprobs
                                                                    └─▶ last rows of pooled prompts

R are the rows whose hidden states are needed: those that are sampled or pooled, and all of a prompt whose
logprobs were asked for.

It keeps tokens, block table and sampling state of every admitted request. It does not decide anything: which
tokens, which blocks and who is sampled is the plan's. A step is computed by `submit`; what fails in it is the
business of `recovery`.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from penstock.core.cost import Coefficients
from penstock.core.errors import DeviceOutOfMemory, RequestFailed, cause
from penstock.core.executor import Capacity, Failures, Items, Ticket
from penstock.core.plan import Admission, Failure, Outcome, Plan, PlanItem, StepResult, TokenLogprob
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.clock import Clock, MonotonicClock
from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.model.causal_lm import CausalLM
from penstock.sampling.logprobs import prompt_logprobs
from penstock.sampling.sampler import Sampled, Sampler
from penstock.sampling.state import SamplingState

from .diagnosis import Diagnosis, finite_rows
from .recovery import Recovery


@dataclass(slots=True)
class _Kept:
    """One admitted request."""

    spec: RequestSpec
    tokens: list[int]
    prompt_len: int
    blocks: array[int]
    state: SamplingState | None
    """None where nothing is sampled."""
    prompt_logprobs: int | None
    """How many are wanted of each prompt position."""


@dataclass(slots=True)
class _Wanted:
    """Which hidden states a step needs, and for what; items by their place in the step."""

    rows: list[int] = field(default_factory=list)
    """Flat rows, ascending."""
    sampled: list[tuple[int, int]] = field(default_factory=list)
    """(item, index in `rows` of its first sampled position)"""
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """(item that wants logprobs of its prompt, index of its first position)"""
    pooled: list[tuple[int, int]] = field(default_factory=list)
    """(item, index of its last position)"""


class TorchExecutor:
    """One model on one device.

    Args:
        model: the loaded model.
        cache: its KV cache. One block more than are offered is the probe's.
        attention: kernels for this cache.
        prior: what steps cost, roughly.
        clock: for limits that hold for a while.
        progress: told before each part of a step that is not computed whole.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        attention: AttentionBackend,
        device: torch.device,
        prior: Coefficients,
        clock: Clock | None = None,
        progress: Callable[[Items], None] | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._device = device
        self._prior = prior
        self._sampler = Sampler(model.operations)
        self._diagnosis = Diagnosis(model, cache, attention)
        self._kept: dict[str, _Kept] = {}
        self._failures = Failures()
        self.recovery = Recovery(self._compute, clock or MonotonicClock(), self.probe, progress)

    def capacity(self) -> Capacity:
        """Sizes of the cache and the model."""
        return Capacity(
            num_blocks=self._cache.num_blocks - 1,
            block_size=self._cache.spec.block_size,
            vocab_size=self._model.config.vocab_size,
            prior=self._prior,
            features=frozenset({"pooling"}),
        )

    def submit(self, plan: Plan) -> Ticket:
        """Compute the step."""
        for request in plan.released:
            self._kept.pop(request, None)  # it may have been lost before it came here
            self._failures.forget(request)
        for admission in plan.admitted:
            self._kept[admission.request] = _keep(admission, self._sibling(admission.spec))
        for item in plan.items:
            if item.blocks:
                self._kept[item.request].blocks.extend(item.blocks)
        started = time.perf_counter()
        outcomes, whole = self._failures.run(plan.items, partial(self.recovery.run, plan.step))
        seconds = time.perf_counter() - started
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

    def _sibling(self, spec: RequestSpec) -> SamplingState | None:
        """What is kept of another sequence of the same request."""
        if spec.n * len(spec.prompts) == 1:
            return None
        return next((kept.state for kept in self._kept.values() if kept.spec is spec), None)

    def probe(self) -> None:
        """One step of a prompt and one of decode, in the block that no plan has.

        Raises whatever the device raises, or RequestFailed where the model computes no numbers: a broken one
        is told from a request that it cannot compute.
        """
        capacity = self.capacity()
        count = min(8, max(1, capacity.block_size - 1))
        ids = tuple(index % capacity.vocab_size for index in range(count))
        spec = RequestSpec(id=_PROBE, prompts=(Prompt(ids, 2),), sampling=Sampling(temperature=0.0))
        self._kept[_PROBE] = kept = _keep(Admission(_PROBE, 0, spec, 0))
        kept.blocks.extend((capacity.num_blocks,) * 2)
        try:
            for start, tokens in ((0, count), (count, 1)):
                (outcome,) = self._compute((PlanItem(_PROBE, 0, start, tokens, samples=1),))
                if outcome.failure is not None:
                    raise RequestFailed(f"a test prompt of {count} tokens fails: {outcome.failure.cause}")
        finally:
            del self._kept[_PROBE]

    def _compute(self, items: Items) -> Sequence[Outcome]:
        """See recovery.Compute."""
        try:
            return self._forward(items)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            what = cause(error).splitlines()[0]
        # not in the handler: the traceback holds the failed step's tensors, which a retry needs the place of
        raise DeviceOutOfMemory(what)

    @torch.inference_mode()
    def _forward(self, items: Items) -> Sequence[Outcome]:
        kept = [self._kept[item.request] for item in items]
        layout = StepLayout(
            [Span(item.start, item.tokens, each.blocks) for item, each in zip(items, kept, strict=True)],
            self._cache.spec.block_size,
        )
        wanted = self._wanted(items, kept, layout)
        hidden = self._model.forward(
            self._on_device(self._token_ids(items, kept)),
            self._on_device(torch.from_numpy(layout.positions)),
            self._attention.prepare(layout),
            self._cache,
            wanted.rows,
        )
        outcomes = [_NOTHING] * len(items)
        about_prompts = [
            (place, self._prompt_logprobs(items[place], kept[place], hidden, first))
            for place, first in wanted.prompts
        ]
        if wanted.sampled:
            self._sample(items, kept, wanted.sampled, hidden, outcomes)
        for place, last in wanted.pooled:
            outcomes[place] = self._pool(kept[place].spec, hidden[last])
        for place, entries in about_prompts:
            outcomes[place] = outcomes[place]._replace(prompt_logprobs=entries)
        for each, outcome in zip(kept, outcomes, strict=True):
            each.tokens += outcome.tokens
        return outcomes

    def _token_ids(self, items: Items, kept: Sequence[_Kept]) -> torch.Tensor:
        flat = array("q")
        for item, each in zip(items, kept, strict=True):
            known = item.tokens - len(item.drafts)
            if known == 1:
                flat.append(each.tokens[item.start])
            else:
                flat.extend(each.tokens[item.start : item.start + known])
            flat.extend(item.drafts)
        return torch.from_numpy(np.frombuffer(flat, np.int64))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)

    def _wanted(self, items: Items, kept: Sequence[_Kept], layout: StepLayout) -> _Wanted:
        wanted = _Wanted()
        rows = wanted.rows
        starts, lasts = layout.query_starts, layout.last_rows
        for place, (item, each) in enumerate(zip(items, kept, strict=True)):
            if each.prompt_logprobs is not None and item.start < each.prompt_len:
                wanted.prompts.append((place, len(rows)))
                rows.extend(range(starts[place], lasts[place] + 1))
            elif item.samples > 1:
                rows.extend(range(lasts[place] + 1 - item.samples, lasts[place] + 1))
            elif item.samples or item.pools:
                rows.append(lasts[place])
            if item.samples:
                wanted.sampled.append((place, len(rows) - item.samples))
            if item.pools:
                wanted.pooled.append((place, len(rows) - 1))
        return wanted

    def _sample(
        self,
        items: Items,
        kept: Sequence[_Kept],
        sampled: Sequence[tuple[int, int]],
        hidden: torch.Tensor,
        outcomes: list[Outcome],
    ) -> None:
        """Sample every position that the items say, and keep of each the tokens up to a draft that was wrong.

        A draft is verified by sampling its position as if it were right: what comes out is what would have
        come out without it, with the same random numbers.
        """
        rows: list[int] = []
        states: list[SamplingState] = []
        for place, first in sampled:
            state = kept[place].state
            assert state is not None  # the plan samples none that has nothing to be sampled by
            states.append(state)
            rows.append(first)
            for count in range(1, items[place].samples):
                states.append(_ahead(state, items[place].drafts[:count]))
                rows.append(first + count)
        last = hidden
        if len(rows) < len(hidden):
            last = hidden.index_select(0, self._on_device(torch.tensor(rows)))
        choices = self._sampler.sample(self._model.logits(last), states)
        failed: list[tuple[int, int]] = []
        begin = 0
        for place, _ in sampled:
            item = items[place]
            outcomes[place], checked = _verified(item.drafts, choices[begin : begin + item.samples])
            if outcomes[place].failure is not None:
                failed.append((place, rows[begin + checked]))
            begin += item.samples
        if failed:
            self._examine(items, kept, failed, hidden, outcomes)

    def _examine(
        self,
        items: Items,
        kept: Sequence[_Kept],
        failed: Sequence[tuple[int, int]],
        hidden: torch.Tensor,
        outcomes: list[Outcome],
    ) -> None:
        """Mark those to which the model itself gave logits that are not finite, whatever the request asked
        for: nothing that it has computed is to be trusted; the log says where they come from."""
        rows = self._on_device(torch.tensor([row for _, row in failed]))
        finite = finite_rows(self._model.logits(hidden.index_select(0, rows)))
        for (place, _), fine in zip(failed, finite, strict=True):
            failure = outcomes[place].failure
            if fine or failure is None:
                continue
            item, each = items[place], kept[place]
            outcomes[place] = Outcome(failure=Failure(failure.cause, tainted=True))
            span = Span(item.start, item.tokens, each.blocks)
            self._diagnosis.report(item.request, self._on_device(self._token_ids((item,), (each,))), span)

    def _prompt_logprobs(
        self, item: PlanItem, kept: _Kept, hidden: torch.Tensor, first: int
    ) -> tuple[TokenLogprob, ...]:
        """Of the prompt tokens that follow this step's positions."""
        targets = kept.tokens[item.start + 1 : min(item.start + item.tokens + 1, kept.prompt_len)]
        entries: list[TokenLogprob] = []
        for begin in range(0, len(targets), _LOGITS_ROWS):
            some = targets[begin : begin + _LOGITS_ROWS]
            logits = self._model.logits(hidden[first + begin : first + begin + len(some)])
            entries.extend(prompt_logprobs(self._model.operations, logits, some, kept.prompt_logprobs or 0))
        return tuple(entries)

    def _pool(self, spec: RequestSpec, state: torch.Tensor) -> Outcome:
        vector = state.float()
        if spec.pooling is not None and spec.pooling.normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        if not bool(vector.isfinite().all()):
            return Outcome(failure=Failure("the prompt's hidden state is not finite.", tainted=True))
        return Outcome(pooled=tuple(vector.tolist()))


_NOTHING = Outcome()
_PROBE = ""
"""No request has this id."""


def _verified(drafts: tuple[int, ...], choices: Sequence[Sampled]) -> tuple[Outcome, int]:
    """(tokens up to the first draft that was wrong, or the failure that was met before; its place)."""
    if not drafts and (only := choices[0]).error is None:
        return Outcome((only.token,), () if only.logprob is None else (only.logprob,)), 0
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    for place, choice in enumerate(choices):
        if choice.error is not None:
            return Outcome(failure=Failure(choice.error)), place
        tokens.append(choice.token)
        if choice.logprob is not None:
            logprobs.append(choice.logprob)
        if place < len(drafts) and drafts[place] != choice.token:
            break
    return Outcome(tuple(tokens), tuple(logprobs)), 0


def _keep(admission: Admission, sibling: SamplingState | None = None) -> _Kept:
    """sibling: of the same request; what its parameters became is shared."""
    spec, ids = admission.spec, admission.prompt.token_ids
    tokens = [*ids, *admission.generated]
    state = None
    if spec.sampling is not None:
        state = SamplingState(
            request=admission.request,
            params=spec.sampling,
            prompt_len=len(ids),
            tokens=tokens,
            eos_ids=spec.eos_ids,
            seed=spec.seed_of(admission.index) or 0,
            sharing=sibling,
        )
    # after a preemption, the prompt's logprobs were delivered before it
    about_prompt = None if admission.generated else spec.prompt_logprobs_of(admission.index)
    return _Kept(spec, tokens, len(ids), array("q"), state, about_prompt)


def _ahead(state: SamplingState, drafts: tuple[int, ...]) -> SamplingState:
    """The state as it will be if these drafts are right."""
    return SamplingState(
        request=state.request,
        params=state.params,
        prompt_len=state.prompt_len,
        tokens=[*state.tokens, *drafts],
        eos_ids=state.eos_ids,
        seed=state.seed,
        sharing=state,
    )


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
