"""Running one HTTP request's choices on the engine, and what they add up to.

    prompts × n ──▶ [Choice] ──▶ engine.generate ──▶ Event ──▶ Choice.pending (text, ids, logprobs)
                                                          └──▶ figures: usage, metrics

It knows prompts as token ids, and events. It knows neither the shape of an answer nor HTTP. The choice of
index i belongs to prompt i // n, as in OpenAI's API.

Figures of a response with several choices (n > 1, several prompts), in milliseconds of the engine's clock:

    arrival ─────────▶ first scheduled ─────────▶ first token ─────────▶ last token
             queue_ms                  prefill_ms              decode_ms
             ttft_ms = queue_ms + prefill_ms

where "first" is the earliest over its choices and "last" the latest. `device_seconds` is the sum of the
shares of the device's time that the engine attributed to them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from penstock.core.errors import (
    BY_NAME,
    EngineDead,
    InvalidRequest,
    PenstockError,
    QueueFull,
    RequestFailed,
)
from penstock.core.plan import Event, Failure, TokenLogprob
from penstock.core.pooling import Vectors
from penstock.core.request_spec import FinishReason, Pooling, RequestSpec, ServiceClass
from penstock.core.request_spec import Prompt as EnginePrompt
from penstock.core.sampling_params import SamplingParams
from penstock.core.structured import Grammar
from penstock.observe.metrics import RequestFigures
from penstock.text.output import OutputProcessor, Pending
from penstock.text.parsers.message import MessageParser
from penstock.text.stop import StopStrings

from .bills import Bill
from .limits import LOGPROB_BYTES, TOKEN_BYTES, check_answer, told_logprobs
from .state import State


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one prompt of a request became."""

    ids: tuple[int, ...]
    text: str
    """As given, as rendered, or (to be shown) as decoded; else empty."""
    max_tokens: int
    """Most tokens to generate, within the context length."""
    generated: tuple[int, ...] = ()
    """Of these, what another server had generated and told when it was lost."""
    second: int | None = None
    """Where the second of two texts begins, for an encoder that tells them apart."""


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of the engine's and what came of it so far."""

    index: int
    id: str
    """Of the sequence."""
    prompt: Prompt
    processor: OutputProcessor | None
    """None where no text is made."""
    pending: Pending = field(default_factory=Pending)
    """The output that no chunk has taken: all of it, for an answer that is sent at once."""
    generated: int = 0
    """Tokens so far, those of earlier chunks included."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    vectors: Vectors | None = None
    """Of the prompt, where it is pooled."""
    settled: bool = False
    """The engine's last event has come: the figures are final."""
    ended: str = ""
    """How, once it is settled."""

    # ---- figures, from the latest event ----
    cached: int = 0
    device_seconds: float = 0.0
    preemptions: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None


class Generation:
    """The choices of one HTTP request."""

    def __init__(
        self,
        state: State,
        prompts: Sequence[Prompt],
        params: SamplingParams | Pooling,
        *,
        id: str,
        arrived_at: float,
        request_id: str = "",
        tenant: str = "",
        service_class: ServiceClass = ServiceClass.REALTIME,
        asked_max_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        drop_output: bool = False,
        parser: Callable[[], MessageParser] | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            params: of the request, with its n; the engine gets its part of them.
            id: of the engine's request.
            arrived_at: seconds of the engine's clock.
            request_id: the client's, for the bill.
            tenant: whose it is, as a trusted gateway says.
            service_class: who waits for it, likewise.
            asked_max_tokens: as the client gave it, for the metrics.
            drop_output: only the prompts are wanted (echo with max_tokens 0): the one token that the engine
                has to generate for them is not shown.
            parser: makes the parser of a choice's text.
            grammar: what the outputs must match.
        """
        self._state = state
        self._request_id = request_id
        self._asked_max_tokens = asked_max_tokens
        self._drop_output = drop_output
        sampling = params if isinstance(params, SamplingParams) else None
        asked = None if sampling is None else sampling.logprobs
        self._logprobs = 0 if asked is None else told_logprobs(asked, state.engine.info.vocab_size)
        self._thinks = state.config.reasoning_parser is not None and parser is not None
        """Whether thoughts are told from the rest."""
        self._produced = 0
        """Tokens of all choices."""
        self._spec = RequestSpec(
            id=id,
            prompts=tuple(
                EnginePrompt(prompt.ids, prompt.max_tokens, generated=prompt.generated, second=prompt.second)
                for prompt in prompts
            ),
            sampling=None if sampling is None else sampling.sampling,
            pooling=params if isinstance(params, Pooling) else None,
            n=1 if sampling is None else sampling.n,
            arrived_at=arrived_at,
            priority=priority,
            service_class=service_class,
            tenant=tenant,
            cache_salt=cache_salt or "",
            grammar=grammar,
        )
        self.choices: list[Choice] = []
        stops = StopStrings(sampling.stop) if sampling is not None and sampling.stop else None
        for index, name in enumerate(self._spec.ids):
            prompt = prompts[index // self._spec.n]
            processor = (
                None
                if sampling is None
                else OutputProcessor(
                    state.tokenizer, prompt.ids, sampling, stops, None if parser is None else parser()
                )
            )
            if prompt.generated and processor is not None and not processor.resume(prompt.generated):
                raise InvalidRequest(
                    "the generated tokens end with a stop string: the answer was whole.",
                    param="generated_token_ids",
                )
            self.choices.append(Choice(index, name, prompt, processor))
        self._by_id = {choice.id: choice for choice in self.choices}
        self._refused = False
        """A sequence of it found the queue full: those that have never run are no requests for the
        statistics."""

    @property
    def prompts(self) -> int:
        """How many it has."""
        return len(self._spec.prompts)

    async def batches(self, on_change: Callable[[Choice], None]) -> AsyncGenerator[None, None]:
        """Run. Says for each event which choice has something pending by it, and yields after each batch of
        events, until the last figure is in.

        Closing it early aborts what still runs; those choices are settled by their last events, which carry
        their final bills. Raises the PenstockError of the first choice that fails (the others are then
        aborted), and EngineDead.
        """
        bills, begun = self._state.bills, False
        bills.arrived(self._request_id)  # until its bill is there, which may be after its client has gone
        try:
            async with aclosing(self._state.engine.generate(self._spec, self._late)) as batches:
                async for events in batches:
                    begun = True
                    self._take_in(events, on_change)
                    yield
        except QueueFull as error:
            if error.bound is not None:
                self._state.metrics.observe_rejection(error.bound)
            raise
        except EngineDead:
            for choice in self.choices:
                if not choice.settled:
                    self._settle(choice, "error")
            raise
        except Exception:
            if not begun:  # the engine has not taken it, and will not say anything of it
                bills.left(self._request_id)
            raise

    async def run(self) -> None:
        """Run to the end; the whole output is pending then. Raises InvalidRequest if it grows too large."""
        async with aclosing(self.batches(lambda choice: None)) as batches:
            async for _ in batches:
                size = self._produced * (TOKEN_BYTES + self._logprobs * LOGPROB_BYTES)
                check_answer(size, self._state.config, "logprobs" if self._logprobs else "max_tokens")

    def usage(self) -> dict[str, Any]:
        """Usage and the bill, as of now (the module's docstring defines the figures). Times not reached are
        null."""
        choices = self.choices
        scheduled = min((c.scheduled_at for c in choices if c.scheduled_at is not None), default=None)
        first = min((c.first_token_at for c in choices if c.first_token_at is not None), default=None)
        last = max((c.last_token_at for c in choices if c.last_token_at is not None), default=None)
        # siblings find their leader's blocks: only the leader's hits saved the client's prompt any work
        leaders = choices[:: self._spec.n]
        # of an answer that goes on, the engine may have had cached what was generated, too
        cached = sum(min(leader.cached, len(leader.prompt.ids)) for leader in leaders)
        prompt_tokens = sum(len(leader.prompt.ids) for leader in leaders)
        completion_tokens = sum(choice.generated for choice in choices)
        details: dict[str, Any] = {"prompt_tokens_details": {"cached_tokens": cached}}
        if self._thinks:
            thought = sum(choice.pending.reasoning_tokens for choice in choices)
            details["completion_tokens_details"] = {"reasoning_tokens": thought}
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            **details,
            "device_seconds": round(sum(c.device_seconds for c in choices), 9),
            "queue_ms": _milliseconds(self._spec.arrived_at, scheduled),
            "prefill_ms": _milliseconds(scheduled, first),
            "ttft_ms": _milliseconds(self._spec.arrived_at, first),
            "decode_ms": _milliseconds(first, last),
        }

    # ---- what its events do ----
    def _late(self, event: Event) -> None:
        """The last event of a choice that nobody waits for any more."""
        choice = self._by_id[event.request]
        if choice.settled:
            return
        _take_figures(choice, event)
        failed = event.finish is FinishReason.ERROR
        if failed and isinstance(event_error(event), QueueFull):
            self._refused = True
        if self._refused and choice.scheduled_at is None:
            self._close(choice, "error")
        else:
            self._settle(choice, "error" if failed else "abort")

    def _take_in(self, events: Sequence[Event], on_change: Callable[[Choice], None]) -> None:
        """Digest a batch. Raises the first failure, after every event has been counted: the bills add up."""
        failure: Exception | None = None
        for event in events:
            try:
                choice = self._digest(event)
                if choice is not None and failure is None:
                    on_change(choice)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _digest(self, event: Event) -> Choice | None:
        """Take in one event. Returns its choice, unless the event adds nothing that a client sees."""
        choice = self._by_id.get(event.request)
        if choice is None or choice.settled:
            return None
        _take_figures(choice, event)
        try:
            return self._apply(choice, event)
        except Exception:
            if event.finish is not None and not choice.settled:  # no other event will bring its bill
                self._settle(choice, "error")
            raise

    def _apply(self, choice: Choice, event: Event) -> Choice | None:
        """What it does to its choice, the figures aside."""
        if event.prompt_logprobs is not None:
            choice.prompt_logprobs = event.prompt_logprobs
        if event.finish is FinishReason.ERROR:
            error = event_error(event)
            if isinstance(error, QueueFull):
                self._refused = True
                self._close(choice, "error")
            raise error
        if event.pooled is not None:
            choice.vectors = event.pooled
            choice.first_token_at = choice.last_token_at = (
                event.at
            )  # it is the answer's first word and its last
        ended = choice.processor is not None and choice.processor.finished
        if choice.processor is not None and not ended:
            self._progress(choice, choice.processor, event)
        if event.finish is not None:
            self._settle(choice, choice.pending.finish_reason or event.finish.value)
        return None if ended else choice

    def _progress(self, choice: Choice, processor: OutputProcessor, event: Event) -> None:
        if event.tokens:
            if choice.last_token_at is None:
                choice.first_token_at = event.at
                self._state.metrics.observe_first_token(event.at - self._spec.arrived_at)
            else:
                self._state.metrics.observe_gap(event.at - choice.last_token_at)
            choice.last_token_at = event.at
        pending = choice.pending
        processor.push(event, pending)
        if self._drop_output:
            pending.clear()
            pending.finish_reason, pending.stop_reason = _unless_aborted(pending.finish_reason), None
        else:
            generated = processor.generated - len(choice.prompt.generated)
            self._produced += generated - choice.generated
            choice.generated = generated
        if processor.finished and event.finish is None:  # the text ended it: the engine goes on without us
            self._state.engine.abort([choice.id])

    def _settle(self, choice: Choice, reason: str) -> None:
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
                e2e=_span(self._spec.arrived_at, last),
                queue=_span(self._spec.arrived_at, choice.scheduled_at),
                prefill=_span(choice.scheduled_at, first),
                decode=_span(first, last),
            )
        )
        self._close(choice, reason)
        n = self._spec.n
        start = choice.index - choice.index % n
        siblings = self.choices[start : start + n]
        if all(other.settled for other in siblings):
            self._state.metrics.observe_prompt(n, max(other.generated for other in siblings))

    def _close(self, choice: Choice, reason: str) -> None:
        """Its figures are final; with those of the last choice, the bill is. What never ran has none."""
        choice.settled, choice.ended = True, reason
        self._state.engine.settled(choice.id)
        if not all(each.settled for each in self.choices):
            return
        if any(each.scheduled_at is not None for each in self.choices):
            self._state.bills.add(self._bill())
        self._state.bills.left(self._request_id)

    def _bill(self) -> Bill:
        usage = self.usage()
        return Bill(
            request_id=self._request_id,
            tenant=self._spec.tenant,
            finish_reasons=tuple(choice.ended for choice in self.choices),
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            device_seconds=usage["device_seconds"],
            ended_at=self._state.wall(),
        )


def event_error(event: Event) -> PenstockError:
    """The exception that an event with finish ERROR stands for."""
    failure = event.failure or Failure("The request failed in the engine for an unknown reason.")
    if failure.type == QueueFull.__name__:  # a setting is at fault, and no field of the request
        flag = "--" + (failure.param or "").replace("_", "-")
        full = QueueFull(
            failure.cause, advice=f"The limit is set by {flag}.", retry_after=failure.retry_after
        )
        full.bound = failure.param
        return full
    error = BY_NAME.get(failure.type, RequestFailed)
    return error(failure.cause, param=failure.param, advice=failure.advice, retry_after=failure.retry_after)


def _take_figures(choice: Choice, event: Event) -> None:
    """They only grow; the last event of a request that the engine could not tell of any more has none."""
    choice.cached = max(choice.cached, event.cached)
    choice.device_seconds = max(choice.device_seconds, event.device_seconds)
    choice.preemptions = max(choice.preemptions, event.preemptions)
    if event.scheduled_at is not None:
        choice.scheduled_at = event.scheduled_at


def _unless_aborted(reason: str | None) -> str | None:
    return reason and (reason if reason == FinishReason.ABORT.value else FinishReason.LENGTH.value)


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(end - start, 0.0)


def _milliseconds(start: float | None, end: float | None) -> float | None:
    span = _span(start, end)
    return None if span is None else round(span * 1e3, 3)
