"""The seam between the door and whoever runs engines of ours (`penstock up`): which replicas a model has now.

    stopped ──want──▶ starting ──▶ ready ──▶ stopped (keep_alive) or failed (back-off) ──▶ starting …

The door asks for a model's replicas at each request, says that it wants one, and waits to be told of changes.
An engine is a URL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

State = Literal["stopped", "starting", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine."""

    id: str
    """Unique among all replicas, and the same after a restart: `demo/0`."""
    url: str
    """Base URL without `/v1` and without a trailing slash."""
    state: State = "ready"
    since: float = 0.0
    """When it came to be in that state; seconds of CLOCK_MONOTONIC."""
    devices: int = 1
    key: str = field(default="", repr=False)
    """API key that it wants."""
    detail: str = ""
    """What is going on, for people who wait: `loading weights`, the cause of a failure."""


class Fleet(Protocol):
    """The engines of ours."""

    def replicas(self, model: str) -> Sequence[Replica]:
        """All replicas of a model of the spec, whatever their state; empty where nobody runs it here."""
        ...

    def want(self, model: str) -> None:
        """A request wants this model: a lazy one is to start, and to stay for its keep_alive from now on."""
        ...

    def on_change(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with a model's name, in the event loop's thread, after each change of its replicas."""
        ...


class NoFleet:
    """Nobody runs engines here: `penstock gateway` in front of upstreams alone."""

    def replicas(self, model: str) -> Sequence[Replica]:
        """See Fleet."""
        return ()

    def want(self, model: str) -> None:
        """See Fleet."""

    def on_change(self, tell: Callable[[str], None]) -> None:
        """See Fleet."""
