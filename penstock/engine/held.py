"""Requests that wait for their grammars, before the scheduler hears of them.

    Add ─▶ hold ─┬─ its grammar is ready ──────────────▶ goes on at once
                 └─ a thread compiles it ··· ready() ───▶ goes on later, or fails with the compiler's words

Others run meanwhile. A compiled grammar is kept as long as a sequence needs it. It knows no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from penstock.core.errors import PenstockError, cause
from penstock.core.plan import Event, Failure
from penstock.core.request_spec import RequestSpec
from penstock.core.structured import Grammar
from penstock.grammar.cache import Grammars
from penstock.grammar.compiler import Compiled


@dataclass(slots=True)
class _Waiting:
    spec: RequestSpec
    compiled: Future[Compiled]
    aborted: set[str] = field(default_factory=set)
    """Of its sequences."""


class Held:
    """Of one engine.

    Args:
        grammars: where they are compiled.
    """

    def __init__(self, grammars: Grammars) -> None:
        self.wake: Callable[[], None] = lambda: None
        """Called, from another thread, when one that waits may go on."""
        self._grammars = grammars
        self._waiting: dict[str, _Waiting] = {}
        """By the id of the request."""
        self._of: dict[str, str] = {}
        """Sequence → request, of those that wait."""
        self._kept: dict[str, Compiled] = {}
        """What sequences need."""

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._of)

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the sequences that wait, in order of arrival."""
        return tuple(self._of)

    def __contains__(self, sequence: object) -> bool:
        """Whether it waits."""
        return sequence in self._of

    def hold(self, spec: RequestSpec) -> bool:
        """Whether it has to wait; `ready` gives it back then."""
        if spec.grammar is None:
            return False
        compiled = self._grammars.ready(spec.grammar)
        if compiled is not None:
            self._keep(spec, compiled)
            return False
        waiting = _Waiting(spec, self._grammars.start(spec.grammar))
        self._waiting[spec.id] = waiting
        self._of.update(dict.fromkeys(spec.ids, spec.id))
        waiting.compiled.add_done_callback(lambda _: self.wake())
        return True

    def ready(self) -> list[tuple[RequestSpec, Failure | None, set[str]]]:
        """(request, why it cannot go on, those of its sequences that were aborted meanwhile), of those that
        wait no longer."""
        found = []
        for waiting in [each for each in self._waiting.values() if each.compiled.done()]:
            spec = waiting.spec
            self._forget(spec)
            failure = _failure(waiting.compiled)
            if failure is None:
                self._keep(spec, waiting.compiled.result())
            found.append((spec, failure, waiting.aborted))
        return found

    def abort(self, sequence: str) -> bool:
        """Whether it waited, and does not any more."""
        request = self._of.pop(sequence, None)
        if request is None:
            return False
        waiting = self._waiting[request]
        waiting.aborted.add(sequence)
        if len(waiting.aborted) == len(waiting.spec.ids):
            waiting.compiled.cancel()
            self._forget(waiting.spec)
        return True

    def ended(self, events: Iterable[Event]) -> None:
        """Whoever has a last event among these needs no grammar any more."""
        if self._kept:
            for event in events:
                if event.finish is not None:
                    self._kept.pop(event.request, None)

    def clear(self) -> list[str]:
        """Forget everybody; the sequences that waited."""
        gone = list(self._of)
        for waiting in self._waiting.values():
            waiting.compiled.cancel()
        self._waiting.clear()
        self._of.clear()
        self._kept.clear()
        return gone

    def compile(self, grammar: Grammar) -> None:
        """Here and now: for those who want to know before they ask. Raises InvalidRequest."""
        self._grammars.compile(grammar)

    def wait(self) -> None:
        """Until one that waits may go on."""
        wait([each.compiled for each in self._waiting.values()], return_when="FIRST_COMPLETED")

    def _keep(self, spec: RequestSpec, compiled: Compiled) -> None:
        self._kept.update(dict.fromkeys(spec.ids, compiled))

    def _forget(self, spec: RequestSpec) -> None:
        del self._waiting[spec.id]
        for sequence in spec.ids:
            self._of.pop(sequence, None)


def _failure(compiled: Future[Compiled]) -> Failure | None:
    error = compiled.exception()
    if error is None:
        return None
    if isinstance(error, PenstockError):
        return Failure(error.message, type(error).__name__, param=error.param, advice=error.advice)
    return Failure(cause(error))
