"""Running one HTTP request's choices on the engine, and what they add up to.

    prompts × n ──▶ [Choice] ──▶ engine.generate ──▶ Event ──▶ OutputProcessor ──▶ (Choice, Delta)
                                                                          └─▶ figures: usage, metrics

It knows prompts as token ids, events and text deltas. It knows neither the shape of an answer nor HTTP. The
choice of index i belongs to prompt i // n, as in OpenAI's API.

Figures of a response with several choices (n > 1, several prompts), in milliseconds of the engine's clock:

    arrival ─────────▶ first scheduled ─────────▶ first token ─────────▶ last token
             queue_ms                  prefill_ms              decode_ms
             ttft_ms = queue_ms + prefill_ms

where "first" is the earliest over its choices and "last" the latest. `device_seconds` is the sum of the
shares of the device's time that the engine attributed to them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from penstock.core.errors import BY_NAME, EngineDead, PenstockError, QueueFull, RequestFailed
from penstock.core.plan import Event, TokenLogprob
from penstock.core.request import FinishReason
from penstock.core.sampling_params import SamplingParams
from penstock.engine.messages import Add
from penstock.observe.metrics import RequestFigures
from penstock.text.output import DecodedLogprob, Delta, OutputProcessor

from .state import State

logger = logging.getLogger("penstock.requests")

#: Most choices (prompts × n) of one HTTP request.
MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one prompt of a request became."""

    ids: tuple[int, ...]
    text: str
    """As given, as rendered, or (for echo) as decoded; else empty."""
    max_tokens: int
    """Most tokens to generate, within the context length."""


@dataclass(slots=True, eq=False)
class Choice:
    """One engine request and what came of it so far."""

    index: int
    prompt: Prompt
    add: Add
    processor: OutputProcessor
    generated: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    settled: bool = False
    """The engine's last event has come: the figures are final."""

    # ---- figures, from the latest event ----
    cached: int = 0
    device_seconds: float = 0.0
    preemptions: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    # ---- the whole output, kept only for answers that are sent at once ----
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[DecodedLogprob] = field(default_factory=list)

    def keep(self, delta: Delta) -> None:
        """Add a delta to the whole output."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()


class Generation:
    """The choices of one HTTP request."""

    def __init__(
        self,
        state: State,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        id: str,
        arrived_at: float,
        asked_max_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        drop_output: bool = False,
    ) -> None:
        """Nothing runs yet.

        Args:
            params: of the request, with its n; the engine gets one request with n = 1 for each choice.
            id: of the response; the engine's request ids begin with it.
            arrived_at: seconds of the engine's clock.
            asked_max_tokens: as the client gave it, for the metrics.
            drop_output: only the prompts are wanted (echo with max_tokens 0): the one token that the engine
                has to generate for them is not shown.
        """
        self._state = state
        self._params = params
        self._arrived_at = arrived_at
        self._asked_max_tokens = asked_max_tokens
        self._drop_output = drop_output
        self.choices = [
            self._choice(prompt, place, number, id, priority, cache_salt or "")
            for place, prompt in enumerate(prompts)
            for number in range(params.n)
        ]
        self._by_id = {choice.add.id: choice for choice in self.choices}

    async def deltas(self) -> AsyncGenerator[list[tuple[Choice, Delta]], None]:
        """Run. Yields what each batch of events adds, until the last figure is in.

        Closing it early aborts what still runs; those choices are settled by their last events, which carry
        their final bills. Raises the PenstockError of the first choice that fails (the others are then
        aborted), and EngineDead.
        """
        adds = [choice.add for choice in self.choices]
        try:
            async with aclosing(self._state.engine.generate(adds, self._late)) as batches:
                async for events in batches:
                    changes = [change for event in events if (change := self._digest(event)) is not None]
                    if changes:
                        yield changes
        except QueueFull as error:
            self._state.metrics.observe_rejection(_limit_at_fault(error))
            for choice in self.choices:  # those that never ran were refused: no requests for the statistics
                choice.settled = choice.settled or choice.scheduled_at is None
            raise
        except EngineDead:
            for choice in self.choices:
                if not choice.settled:
                    self._settle(choice, "error")
            raise

    async def run(self) -> None:
        """Run to the end, keeping the whole output in the choices."""
        async with aclosing(self.deltas()) as batches:
            async for changes in batches:
                for choice, delta in changes:
                    choice.keep(delta)

    def usage(self) -> dict[str, Any]:
        """Usage and the bill, as of now (the module's docstring defines the figures). Times not reached are
        null."""
        choices = self.choices
        scheduled = min((c.scheduled_at for c in choices if c.scheduled_at is not None), default=None)
        first = min((c.first_token_at for c in choices if c.first_token_at is not None), default=None)
        last = max((c.last_token_at for c in choices if c.last_token_at is not None), default=None)
        # siblings find their leader's blocks: only the leader's hits saved the client's prompt any work
        leaders = choices[:: self._params.n]
        cached = sum(leader.cached for leader in leaders)
        prompt_tokens = sum(len(leader.prompt.ids) for leader in leaders)
        completion_tokens = sum(choice.generated for choice in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "device_seconds": round(sum(c.device_seconds for c in choices), 9),
            "queue_ms": _milliseconds(self._arrived_at, scheduled),
            "prefill_ms": _milliseconds(scheduled, first),
            "ttft_ms": _milliseconds(self._arrived_at, first),
            "decode_ms": _milliseconds(first, last),
        }

    def _choice(
        self, prompt: Prompt, place: int, number: int, id: str, priority: int, cache_salt: str
    ) -> Choice:
        params = self._params.sibling(number) if self._params.n > 1 else self._params
        add = Add(
            id=f"{id}:{place}:{number}",
            prompt=prompt.ids,
            params=params,
            max_tokens=prompt.max_tokens,
            arrived_at=self._arrived_at,
            priority=priority,
            cache_salt=cache_salt,
            leader=f"{id}:{place}:0" if number else None,
        )
        processor = OutputProcessor(self._state.tokenizer, prompt.ids, params)
        return Choice(index=place * self._params.n + number, prompt=prompt, add=add, processor=processor)

    def _digest(self, event: Event) -> tuple[Choice, Delta] | None:
        """Take in one event. None when it adds nothing that a client sees."""
        choice = self._by_id.get(event.request)
        if choice is None or choice.settled:
            return None
        self._take_figures(choice, event)
        if event.prompt_logprobs is not None:
            choice.prompt_logprobs = event.prompt_logprobs
        if event.finish is FinishReason.ERROR:
            error = event_error(event)
            if not isinstance(error, QueueFull):
                self._settle(choice, "error")
            raise error
        change: tuple[Choice, Delta] | None = None
        if choice.finish_reason is None:
            change = choice, self._progress(choice, event)
        if event.finish is not None:
            self._settle(choice, choice.finish_reason or event.finish.value)
        return change

    def _late(self, event: Event) -> None:
        """The last event of a choice that nobody waits for any more."""
        choice = self._by_id[event.request]
        if choice.settled:
            return
        if event.error_type == QueueFull.__name__ and event.finish is FinishReason.ERROR:
            choice.settled = True  # refused with its siblings: no request for the statistics
            return
        self._take_figures(choice, event)
        self._settle(choice, "abort")

    def _take_figures(self, choice: Choice, event: Event) -> None:
        choice.cached = event.cached
        choice.device_seconds = event.device_seconds
        choice.preemptions = event.preemptions
        choice.scheduled_at = event.scheduled_at

    def _progress(self, choice: Choice, event: Event) -> Delta:
        if event.tokens:
            if choice.last_token_at is None:
                choice.first_token_at = event.at
                self._state.metrics.observe_first_token(event.at - self._arrived_at)
            else:
                self._state.metrics.observe_gap(event.at - choice.last_token_at)
            choice.last_token_at = event.at
        delta = choice.processor.push(event)
        if self._drop_output:
            delta = Delta(finish_reason=delta.finish_reason and _unless_aborted(delta.finish_reason))
        choice.generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
            if event.finish is None:  # a stop string: the engine does not know of it
                self._state.engine.abort([choice.add.id])
        return delta

    def _settle(self, choice: Choice, reason: str) -> None:
        choice.settled = True
        first, last = choice.first_token_at, choice.last_token_at
        self._state.metrics.observe_sequence(
            RequestFigures(
                finished_reason=reason,
                prompt_tokens=len(choice.prompt.ids),
                generation_tokens=choice.generated,
                cached_tokens=choice.cached,
                max_tokens=self._asked_max_tokens,
                preemptions=choice.preemptions,
                device_seconds=choice.device_seconds,
                e2e=_span(self._arrived_at, last),
                queue=_span(self._arrived_at, choice.scheduled_at),
                prefill=_span(choice.scheduled_at, first),
                decode=_span(first, last),
            )
        )
        n = self._params.n
        start = choice.index - choice.index % n
        siblings = self.choices[start : start + n]
        if all(other.settled for other in siblings):
            self._state.metrics.observe_prompt(n, max(other.generated for other in siblings))


def event_error(event: Event) -> PenstockError:
    """The exception that an event with finish ERROR stands for."""
    error_class = BY_NAME.get(event.error_type, RequestFailed)
    message = event.error or "The request failed in the engine for an unknown reason."
    return error_class(message, retry_after=event.retry_after)


def _unless_aborted(reason: str) -> str:
    return reason if reason == FinishReason.ABORT.value else FinishReason.LENGTH.value


def _limit_at_fault(error: PenstockError) -> str:
    """The flag that a QueueFull names, for the metric's label."""
    by_tokens = "--max-num-queued-tokens" in error.message
    return "max_num_queued_tokens" if by_tokens else "max_num_queued_reqs"


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(end - start, 0.0)


def _milliseconds(start: float | None, end: float | None) -> float | None:
    span = _span(start, end)
    return None if span is None else round(span * 1e3, 3)
