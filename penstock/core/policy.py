"""Who goes first, and who yields: pure functions of requests and time.

A policy knows requests, the time, and what each tenant has had; it does not know blocks, plans or devices.
Every order ends in the arrival number, so no two requests ever tie and the same input gives the same plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .request import Request
from .request_spec import ServiceClass

OrderKey = tuple[float, ...]


@dataclass(slots=True)
class View:
    """What a policy may look at besides the request."""

    now: float = 0.0
    """Of the step that is planned, in the caller's seconds."""
    served: dict[str, float] = field(default_factory=dict)
    """Device seconds of each tenant that has requests here, as far as steps are committed, since it came: it
    begins with the least that anybody has had. Kept for dynamic policies only."""


class Policy(Protocol):
    """The decisions of a scheduler that are a matter of taste."""

    @property
    def name(self) -> str:
        """What it is chosen by."""
        ...

    @property
    def dynamic(self) -> bool:
        """Whether keys change while a request is here: then all are asked for again in every step."""
        ...

    def order(self, request: Request, view: View) -> OrderKey:
        """Sort key, smallest first: in the queue, for the token budget, and (reversed) for preemption."""
        ...

    def victim(self, running: Sequence[Request], view: View) -> Request:
        """Which of these running requests, in order, gives up its blocks."""
        ...


class _LastYields:
    """Whoever goes last yields first."""

    dynamic = False

    def victim(self, running: Sequence[Request], view: View) -> Request:
        """The last in order."""
        return running[-1]


@dataclass(frozen=True)
class Fcfs(_LastYields):
    """First come, first served; the last to come yields first."""

    name: str = "fcfs"

    def order(self, request: Request, view: View) -> OrderKey:
        """Arrival."""
        return (request.arrival,)


@dataclass(frozen=True)
class Priority(_LastYields):
    """What somebody waits for before what nobody does, then lower priority numbers, then arrival; the least
    urgent and youngest yields first."""

    name: str = "priority"

    def order(self, request: Request, view: View) -> OrderKey:
        """Class, priority, arrival."""
        spec = request.spec
        return (spec.service_class is ServiceClass.BACKGROUND, spec.priority, request.arrival)


POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "priority": Priority}


def create_policy(name: str) -> Policy:
    """The policy of this name; raises ValueError with the choices."""
    if name not in POLICIES:
        raise ValueError(f"unknown scheduling policy {name!r}; choose from {', '.join(POLICIES)}")
    return POLICIES[name]()
