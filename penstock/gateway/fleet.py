"""The seam between the door and the engines on this machine: which replicas a model has, and how they are.

    door ── use(model) ─▶ in flight, so that nobody puts the model to sleep
         ── ready(model, …) ─▶ waits, bounded, until a replica takes requests; wakes a model that sleeps
         ── replicas(model) ─▶ where they are
         ◀─ changes ── subscribe

A model of an upstream has no fleet: its replicas are the upstream's URLs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import msgspec

from penstock.core.errors import Unavailable

State = Literal["asleep", "starting", "ready", "stopping", "waiting"]
"""`asleep` has no process; `waiting` has died and is started again after a while."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, as it is now. Its URL stays the same over restarts."""

    model: str
    index: int
    url: str
    """Base URL, without a trailing slash or /v1."""
    state: State
    since: float
    """Monotonic time from which on it is in this state."""
    device: str
    """Kind of device, as its pool names it."""
    devices: int
    """Devices that it takes; device-seconds count each."""
    restarts: int = 0
    """How often it has been started again."""
    why: str = ""
    """Why it is not there: what it said when it ended last."""

    @property
    def name(self) -> str:
        """As the log, the ledger and metrics call it: `demo/0`."""
        return f"{self.model}/{self.index}"


class ModelStarting(Unavailable):
    """The model is not there yet, and waiting has an end."""

    code = "model_starting"


class Fleet(Protocol):
    """Who has the engines."""

    key: str
    """The bearer token that they accept; nobody else knows it."""

    def models(self) -> Sequence[str]:
        """Names of all local models."""
        ...

    def replicas(self, model: str) -> Sequence[Replica]:
        """All replicas of a model, whatever their state; none for a name that is not local."""
        ...

    async def ready(self, model: str, *, timeout: float, max_waiting: int | None = None) -> None:
        """Return once a replica takes requests, at once if one does; start the model if it sleeps.

        Raises ModelStarting, with retry_after, after `timeout` seconds, or when `max_waiting` wait already.
        """
        ...

    def use(self, model: str) -> AbstractContextManager[None]:
        """Around each request, `ready` included: the model stays for it; `keep_alive` begins with its end."""
        ...

    def subscribe(self, callback: Callable[[Replica], None]) -> None:
        """Call back, on the event loop, whenever a replica changes."""
        ...
