"""Beam search of one HTTP request: what `Generation` is for sampling, for all of its prompts in step.

    searches ─▶ one engine request per token, a prompt for each beam ─▶ logprobs ─▶ … ─▶ choices, all at once

Beams share what they have in common through the prefix cache. Nothing can be told before the last token: a
stream has its choices whole. The bill is that of all steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from penstock.core.errors import EngineDead, QueueFull
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.core.request_spec import Prompt as EnginePrompt
from penstock.core.sampling_params import Sampling
from penstock.text.beams import Beam, BeamSearch
from penstock.text.output import Pending

from .generation import Choice, Generation, event_error


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """How to search."""

    length_penalty: float = 1.0
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True


class BeamGeneration(Generation):
    """The choices of one HTTP request that are searched for. Its n is the width."""

    beams = BeamParams()
    """Set before it runs."""

    async def batches(self, on_change: Callable[[Choice], None]) -> AsyncGenerator[None, None]:
        """See Generation. One batch, with everything."""
        state, spec, n = self._state, self._spec, self._spec.n
        eos_ids = () if self.beams.ignore_eos else state.engine.info.eos_ids
        searches = [
            BeamSearch(
                prompt.token_ids,
                width=n,
                max_tokens=prompt.max_tokens,
                length_penalty=self.beams.length_penalty,
                eos_ids=eos_ids,
                include_stop=self.beams.include_stop,
            )
            for prompt in spec.prompts
        ]
        state.bills.arrived(self._request_id)
        self._billed = self.choices[0]
        self._awaited: set[str] = set()
        """Sequences of the step under way whose last event has not come."""
        self._ending = "error"
        try:
            number = 0
            while running := [search for search in searches if not search.done]:
                found = await self._step(running, number)
                number += 1
                for search in running:
                    asked = len(search.asks)
                    search.take([event.logprobs[0] for event in found[:asked]])
                    found = found[asked:]
            for index, search in enumerate(searches):
                for choice, beam in zip(
                    self.choices[index * n : (index + 1) * n], search.best(), strict=False
                ):
                    self._fill(choice, beam)
            self._ending = ""
        except QueueFull as error:
            if error.bound is not None:
                state.metrics.observe_rejection(error.bound)
            raise
        except EngineDead:
            self._awaited.clear()  # nothing will come
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self._ending = "abort"
            raise
        finally:
            self._end()
        for choice in self.choices:
            on_change(choice)
        yield

    async def _step(self, running: Sequence[BeamSearch], number: int) -> list[Event]:
        """The next token's logprobs of all beams, in order. Raises the first failure."""
        asks = [ask for search in running for ask in search.asks]
        count = min(2 * self._spec.n, self._state.engine.info.vocab_size)
        spec = replace(
            self._spec,
            id=f"{self._spec.id}.{number}",
            prompts=tuple(EnginePrompt(ids, 1) for ids in asks),
            sampling=Sampling(temperature=0.0, logprobs=count, ignore_eos=True),
            n=1,
        )
        found: dict[str, Event] = {}
        self._awaited = set(spec.ids)
        first = number == 0
        async with aclosing(self._state.engine.generate(spec, self._late)) as batches:
            async for events in batches:
                for event in events:
                    if event.tokens:
                        found[event.request] = event
                    self._account(event, first)
        return [found[id] for id in spec.ids]

    def _account(self, event: Event, first: bool) -> None:
        billed = self._billed
        if first:
            billed.cached = max(billed.cached, event.cached)
        if billed.scheduled_at is None:
            billed.scheduled_at = event.scheduled_at
        if event.tokens:
            if billed.first_token_at is None:
                billed.first_token_at = event.at
                self._state.metrics.observe_first_token(event.at - self._spec.arrived_at)
            billed.last_token_at = event.at
        if event.finish is not None:
            self._billed_for(event)
        if event.finish is FinishReason.ERROR:
            raise event_error(event)

    def _billed_for(self, event: Event) -> None:
        self._billed.device_seconds += event.device_seconds
        self._state.engine.settled(event.request)
        self._awaited.discard(event.request)

    def _late(self, event: Event) -> None:
        self._billed_for(event)
        self._end()

    def _end(self) -> None:
        """The figures are final once the last step's last event is there."""
        if self._awaited or all(choice.settled for choice in self.choices):
            return
        for choice in self.choices:
            if not self._ending and choice.pending.finish_reason is None:
                choice.pending.finish_reason = FinishReason.LENGTH.value  # fewer continuations than asked for
            reason = self._ending or str(choice.pending.finish_reason)
            if self._ending and self._billed.scheduled_at is None:
                self._close(choice, reason)  # it has never run
            else:
                self._settle(choice, reason)

    def _fill(self, choice: Choice, beam: Beam) -> None:
        tokens = beam.tokens
        text = self._state.tokenizer.decode(tokens, skip_special_tokens=self.beams.skip_special_tokens)
        choice.generated = len(tokens)
        self._produced += len(tokens)
        choice.pending = Pending(
            pieces=[text] if text else [],
            token_ids=list(tokens),
            finish_reason=(FinishReason.LENGTH if beam.stop_reason is None else FinishReason.STOP).value,
            stop_reason=beam.stop_reason,
        )
