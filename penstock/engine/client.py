"""The API process's view of the engine: a protocol, so that the server can be tested without one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.errors import PenstockError
from penstock.core.plan import Event
from penstock.core.request_spec import RequestSpec
from penstock.core.stats import EngineStats

from .messages import ModelInfo


@dataclass(frozen=True, slots=True)
class Liveness:
    """Whether the engine makes progress."""

    alive: bool
    reason: str
    """Empty when alive; else what is stuck, since when, and what the bound was."""


class EngineClient(Protocol):
    """One engine, running elsewhere. All methods are called from one asyncio event loop."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        ...

    def generate(
        self, spec: RequestSpec, on_orphan: Callable[[Event], None] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """Run a request and yield the events of all of its sequences (`spec.ids`), several at a time.

        Ends after the last event of every sequence (`finish` set). Closing the iterator early (aclose, or
        cancelling the task) aborts what still runs and frees its blocks; `on_orphan` then gets the last event
        of each of these sequences, when it comes: it carries the final bill.
        Raises EngineDead with the root cause if the engine dies.
        """
        ...

    def abort(self, ids: Sequence[str]) -> None:
        """End these sequences; each still yields a last event that carries its final figures."""
        ...

    def settled(self, id: str) -> None:
        """The figures of this sequence's last event are counted: nobody else needs to, whatever happens to
        this process. To be called once for each last event that was yielded or given to `on_orphan`."""
        ...

    def liveness(self) -> Liveness:
        """Judge progress now: not alive when work waits and no step ended within the bound."""
        ...

    @property
    def ready(self) -> bool:
        """Loaded, alive and not draining."""
        ...

    @property
    def draining(self) -> bool:
        """Shutting down: running requests end, new ones are refused."""
        ...

    @property
    def failure(self) -> PenstockError | None:
        """Why the engine died, if it did."""
        ...

    @property
    def load(self) -> int:
        """Requests that the engine has taken and not finished, those of other API processes included."""
        ...

    @property
    def stats(self) -> EngineStats:
        """State after the last step."""
        ...

    def on_stats(self, callback: Callable[[EngineStats], None]) -> None:
        """Call back with the statistics of every step (for metrics); one client of an engine hears them."""
        ...

    async def drain(self, timeout: float) -> None:
        """Refuse new requests from now on; return when all running ones have ended. What still runs after
        `timeout` seconds is aborted."""
        ...

    async def close(self) -> None:
        """Stop the engine now, whatever it is doing, and wait until it is gone."""
        ...
