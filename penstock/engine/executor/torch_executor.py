"""Computes steps with torch, on a CPU or a CUDA device.

    Plan ─▶ kept requests ─▶ StepLayout ─▶ model ─▶ hidden [R, H] ─┬─▶ logits of sampled rows ─▶ Sampler
                                                                    ├─▶ logits of prompts' rows ─▶ logprobs
                                                                    └─▶ rows of pooled prompts ─▶ Pooler

R are the rows whose hidden states are needed: those that are sampled or pooled, and all of a prompt whose
logprobs were asked for.

It keeps tokens, block table and sampling state of every admitted request. It does not decide anything: which
tokens, which blocks and who is sampled is the plan's. A step is computed by `submit`, and what fails in it is
the business of `recovery`; or, on a device that computes by itself, `submit` queues it (`ahead`) and
`collect` waits for it.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.cost import Coefficients
from penstock.core.errors import RequestFailed, cause
from penstock.core.executor import Capacity, Items, Ticket
from penstock.core.plan import Admission, Failure, Outcome, Plan, PlanItem, StepResult, TokenLogprob
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.clock import Clock, MonotonicClock
from penstock.grammar.cache import Grammars
from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.model.causal_lm import CausalLM
from penstock.model.pooler import Pooler, plain_pooler
from penstock.sampling.logprobs import prompt_logprobs
from penstock.sampling.processors import Processors
from penstock.sampling.sampler import Sampler
from penstock.sampling.state import SamplingState

from . import drafts
from .ahead import Ahead, Queued
from .diagnosis import Diagnosis, finite_rows
from .faults import computed, is_lost, lost
from .graphs import DecodeGraphs
from .kept import Kept, Wanted, keep
from .offload import HostCache
from .recovery import Recovery
from .stream import HostStream, Mark, Stream

logger = logging.getLogger("penstock.engine")


@dataclass(slots=True)
class _Flight:
    """A submitted step."""

    step: int
    items: Items
    kept: list[Kept]
    """One for each item, whoever has its name when the step is done."""
    begin: Mark = None
    end: Mark = None
    queued: Queued | None = None
    """What the device computes meanwhile, of those that had not failed."""
    result: StepResult | None = None
    """When it is settled."""


class TorchExecutor:
    """One model on one device.

    Args:
        model: the loaded model.
        cache: its KV cache. One block more than are offered is the probe's.
        attention: kernels for this cache.
        prior: what steps cost, roughly.
        clock: for limits that hold for a while.
        progress: told before each part of a step that is not computed whole.
        stream: the device's queue; None is a processor that computes when it is called.
        host: where blocks of preempted requests may go.
        grammars: those of requests that have one; without, it serves none.
        processors: the user's own, of the logits.
        pooler: of a model that pools; by default, hidden states of last positions are what there is.
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
        stream: Stream | None = None,
        host: HostCache | None = None,
        grammars: Grammars | None = None,
        pooler: Pooler | None = None,
        processors: Processors | None = None,
    ) -> None:
        self._model = model
        self._pooler = pooler or plain_pooler(model.config)
        self._cache = cache
        self._attention = attention
        self._device = device
        self._prior = prior
        self._grammars = grammars
        self._host = host
        self._sampler = Sampler(model.operations, processors)
        self._diagnosis = Diagnosis(model, cache, attention)
        self._stream = stream or HostStream()
        self._ahead = Ahead(model, cache, attention, self._stream, self._sampler)
        self._kept: dict[str, Kept] = {}
        self._queued: deque[_Flight] = deque()
        """Steps that are not settled yet, the oldest first."""
        self.recovery = Recovery(self._compute, clock or MonotonicClock(), self.probe, progress)

    def capacity(self) -> Capacity:
        """Sizes of the cache and the model."""
        return Capacity(
            num_blocks=self._cache.num_blocks - 1,
            block_size=self._cache.spec.block_size,
            vocab_size=self._model.config.vocab_size,
            host_blocks=self._host.num_blocks if self._host is not None else 0,
            prior=self._prior,
            features=frozenset({"pooling"} if self._grammars is None else {"pooling", "grammar"}),
        )

    @property
    def model(self) -> CausalLM:
        """What it computes."""
        return self._model

    def record(self, graphs: DecodeGraphs) -> None:
        """Replay steps of decode from these."""
        self._ahead.graphs = graphs

    def submit(self, plan: Plan) -> Ticket:
        """Queue the step; or compute it at once, where something in it waits for the host.

        Raises DeviceLost.
        """
        self._apply(plan)
        flight = _Flight(plan.step, plan.items, [self._kept[item.request] for item in plan.items])
        if plan.copies:
            flight.begin = self._stream.mark()
            self._copy(plan)
        if not self._queue(flight):
            self._compute_now(flight)
        return Ticket(plan.step, flight)

    def collect(self, ticket: Ticket) -> StepResult:
        """The step's result, when it is there. Raises DeviceLost."""
        flight = ticket.payload
        if not isinstance(flight, _Flight):
            raise TypeError(f"ticket {ticket} is not from this executor")
        while flight.result is None:
            self._settle(self._queued.popleft())
        return flight.result

    def _apply(self, plan: Plan) -> None:
        for request in plan.released:
            kept = self._kept.pop(request, None)  # it may have been lost before it came here
            if kept is not None:
                self._ahead.release(kept)
        for admission in plan.admitted:
            self._kept[admission.request] = kept = keep(admission, self._sibling(admission.spec))
            if kept.state is not None and admission.spec.grammar is not None and self._grammars is not None:
                kept.state.grammar = self._grammars.matcher(admission.spec.grammar)
        for item in plan.items:
            if item.blocks:
                self._kept[item.request].blocks.extend(item.blocks)

    def _copy(self, plan: Plan) -> None:
        """Queue the copies between device and host."""
        if self._host is None:
            raise ValueError(f"step {plan.step} copies blocks to a host that has room for none")
        try:
            self._host.store(plan.swap_out)
            self._host.load(plan.swap_in)
        except RuntimeError as error:
            if is_lost(error):
                raise lost(error) from error
            raise  # whose keys and values they are, nobody else has

    def _queue(self, flight: _Flight) -> bool:
        """Start what can be computed while the host goes on; False where it is to be computed now."""
        if self.recovery.limits.active:
            return False
        items, kept = _sound(flight)
        if not items or not self._ahead.takes(items, kept):
            return False
        begin = self._stream.mark() if flight.begin is None else flight.begin
        try:
            flight.queued = self._ahead.queue(items, kept)
        except Exception as error:
            if is_lost(error):
                raise lost(error) from error
            # the other way tries again, in parts, and says what becomes of whom
            logger.info("step %d could not be queued: %s", flight.step, cause(error).splitlines()[0])
            return False
        flight.begin, flight.end = begin, self._stream.mark()
        self._queued.append(flight)
        return True

    def _compute_now(self, flight: _Flight) -> None:
        """Compute the step, when all before it are settled: it needs their tokens."""
        while self._queued:
            self._settle(self._queued.popleft())
        items, _ = _sound(flight)
        if flight.begin is None:
            flight.begin = self._stream.mark()
        outcomes, whole = self.recovery.run(flight.step, items) if items else ((), True)
        flight.end = self._stream.mark()
        made = iter(outcomes)
        for kept in flight.kept:
            if kept.failure is None and (outcome := next(made)).failure is not None:
                kept.failure = outcome
        made = iter(outcomes)
        sound = {item.request for item in items}
        self._finish(
            flight,
            [
                next(made) if item.request in sound else _failed(kept)
                for item, kept in zip(flight.items, flight.kept, strict=True)
            ],
            whole,
        )

    def _settle(self, flight: _Flight) -> None:
        """Wait for a step, and take in its tokens."""
        assert flight.queued is not None
        try:
            self._stream.wait(flight.end)
        except RuntimeError as error:
            raise lost(error) from error
        made: dict[str, Outcome] = {}
        for item, kept, token in flight.queued.answers():
            if kept.failure is None and item.samples:
                if token is None:
                    kept.failure = self._explain(item, kept)
                else:
                    kept.tokens.append(token)
            made[item.request] = kept.failure or (_NOTHING if token is None else Outcome((token,)))
        self._finish(
            flight,
            [
                made.get(item.request) or _failed(kept)
                for item, kept in zip(flight.items, flight.kept, strict=True)
            ],
            whole=True,
        )

    def _finish(self, flight: _Flight, outcomes: Sequence[Outcome], whole: bool) -> None:
        self._stream.wait(flight.end)
        seconds = self._stream.seconds(flight.begin, flight.end)
        flight.result = StepResult(flight.step, seconds, tuple(outcomes), regular=whole)

    def _explain(self, item: PlanItem, kept: Kept) -> Outcome:
        """Why nothing could be chosen for it in a step that was queued: its part of it is computed again,
        alone, and the log hears of it, too; not where it has left meanwhile: its blocks may be another's."""
        unknown = Outcome(failure=Failure("its logits were not finite.", tainted=True))
        state = kept.state
        if self._kept.get(item.request) is not kept or state is None:
            return unknown
        pending, state.pending = state.pending, 0
        known = len(kept.tokens)
        try:
            (again,) = self._compute((item,))
        except Exception as error:
            if is_lost(error):
                raise
            logger.warning("request %s: its step could not be computed again: %s", item.request, cause(error))
            return unknown
        finally:
            state.pending = pending
            del kept.tokens[known:]
        return again if again.failure is not None else unknown

    def close(self) -> None:
        """Drop requests and memory."""
        self._kept.clear()
        self._queued.clear()
        if self._ahead.graphs is not None:
            self._ahead.graphs.drop()
        if self._host is not None:
            self._host.close()
        self._cache.layers.clear()

    def _sibling(self, spec: RequestSpec) -> SamplingState | None:
        """What is kept of another sequence of the same request."""
        if spec.n * len(spec.prompts) == 1:
            return None
        return next((kept.state for kept in self._kept.values() if kept.spec is spec), None)

    def probe(self, tokens: int = 8) -> None:
        """One step of a prompt and one of decode (of a model that pools, one prompt), in the block that no
        plan has.

        tokens: of the prompt. Of those that do not fit into the block, some lie in the place of others: what
        is computed means nothing then, but is computed.

        Raises whatever the device raises, or RequestFailed where the model computes no numbers: a broken one
        is told from a request that it cannot compute.
        """
        capacity = self.capacity()
        count = tokens if tokens > 8 else min(tokens, max(1, capacity.block_size - 1))
        ids = tuple(index % capacity.vocab_size for index in range(count))
        spec = RequestSpec(id=_PROBE, prompts=(Prompt(ids, 2),), sampling=Sampling(temperature=0.0))
        steps: Items = (PlanItem(_PROBE, 0, 0, count, samples=1), PlanItem(_PROBE, 0, count, 1, samples=1))
        if self._pooler.own:
            pooling = self._pooler.plan.info.pooling()
            spec = RequestSpec(id=_PROBE, prompts=(Prompt(ids, 0),), pooling=pooling)
            steps = (PlanItem(_PROBE, 0, 0, count, pools=True),)
        self._kept[_PROBE] = kept = keep(Admission(_PROBE, 0, spec, 0))
        kept.blocks.extend((capacity.num_blocks,) * (count // capacity.block_size + 1))
        try:
            for item in steps:
                (outcome,) = self._compute((item,))
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
        layout = StepLayout(
            [Span(item.start, item.tokens, each.blocks) for item, each in zip(items, kept, strict=True)],
            self._cache.spec.block_size,
        )
        wanted = Wanted.of(items, kept, layout)
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
        for place, first in wanted.pooled:
            outcomes[place] = self._pool(items[place], kept[place], hidden[first:])
        for place, entries in about_prompts:
            outcomes[place] = outcomes[place]._replace(prompt_logprobs=entries)
        for each, outcome in zip(kept, outcomes, strict=True):
            each.tokens += outcome.tokens
        return outcomes

    def _token_ids(self, items: Items, kept: Sequence[Kept]) -> torch.Tensor:
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
        return self._stream.send(tensor.numpy())

    def _sample(
        self,
        items: Items,
        kept: Sequence[Kept],
        sampled: Sequence[tuple[int, int]],
        hidden: torch.Tensor,
        outcomes: list[Outcome],
    ) -> None:
        """Sample every position that the items say, and keep of each the tokens up to a wrong draft."""
        rows: list[int] = []
        states: list[SamplingState] = []
        for place, first in sampled:
            state = kept[place].state
            assert state is not None  # the plan samples none that has nothing to be sampled by
            states.append(state)
            rows.append(first)
            for count in range(1, items[place].samples):
                states.append(drafts.ahead(state, items[place].drafts[:count]))
                rows.append(first + count)
        last = hidden
        if len(rows) < len(hidden):
            last = hidden.index_select(0, self._on_device(torch.tensor(rows)))
        choices = self._sampler.sample(self._model.logits(last), states)
        failed: list[tuple[int, int]] = []
        begin = 0
        for place, _ in sampled:
            item = items[place]
            outcomes[place], checked = drafts.verified(item.drafts, choices[begin : begin + item.samples])
            if outcomes[place].failure is not None:
                failed.append((place, rows[begin + checked]))
            begin += item.samples
        if failed:
            self._examine(items, kept, failed, hidden, outcomes)

    def _examine(
        self,
        items: Items,
        kept: Sequence[Kept],
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
        self, item: PlanItem, kept: Kept, hidden: torch.Tensor, first: int
    ) -> tuple[TokenLogprob, ...]:
        """Of the prompt tokens that follow this step's positions."""
        targets = kept.tokens[item.start + 1 : min(item.start + item.tokens + 1, kept.prompt_len)]
        entries: list[TokenLogprob] = []
        for begin in range(0, len(targets), _LOGITS_ROWS):
            some = targets[begin : begin + _LOGITS_ROWS]
            logits = self._model.logits(hidden[first + begin : first + begin + len(some)])
            entries.extend(prompt_logprobs(self._model.operations, logits, some, kept.prompt_logprobs or 0))
        return tuple(entries)

    def _pool(self, item: PlanItem, kept: Kept, rows: torch.Tensor) -> Outcome:
        """rows: from the first one of the item on."""
        pooling = kept.spec.pooling
        assert pooling is not None  # the plan pools nothing else
        states = rows[:1]
        if kept.pools_all:
            kept.hidden[item.start] = rows[: item.tokens].clone()
            if not item.pools:
                return _NOTHING
            states = torch.cat([kept.hidden[start] for start in sorted(kept.hidden)])
        (vectors,) = self._pooler(pooling, states, [len(states)], [kept.tokens])
        if vectors is None:
            return Outcome(failure=Failure("the prompt's hidden states are not finite.", tainted=True))
        return Outcome(pooled=vectors)


_NOTHING = Outcome()
_PROBE = ""
"""No request has this id."""


def _sound(flight: _Flight) -> tuple[Items, list[Kept]]:
    """Those of a step that have not failed."""
    kept = [each for each in flight.kept if each.failure is None]
    if len(kept) == len(flight.kept):
        return flight.items, kept
    pairs = zip(flight.items, flight.kept, strict=True)
    return tuple(item for item, each in pairs if each.failure is None), kept


def _failed(kept: Kept) -> Outcome:
    assert kept.failure is not None  # only those are left out of a step
    return kept.failure


#: Rows of prompt logits that exist at one time: 128 rows of a 150k vocabulary are 38 MB in bfloat16.
_LOGITS_ROWS = 128
