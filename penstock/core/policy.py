"""Who goes first, who yields, and how much of a prompt goes into one step: pure functions of state.

A policy knows requests; it does not know blocks, plans or devices. Every order ends in the arrival number,
so no two requests ever tie and the same input gives the same plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .request import Request

OrderKey = tuple[float, ...]


class Policy(Protocol):
    """The decisions of a scheduler that are a matter of taste."""

    @property
    def name(self) -> str:
        """As in --scheduling-policy."""
        ...

    def order(self, request: Request) -> OrderKey:
        """Sort key, smallest first: in the queue, for the token budget, and (reversed) for preemption."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Which of these running requests gives up its blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served; the last to come yields first."""

    name: str = "fcfs"

    def order(self, request: Request) -> OrderKey:
        """Arrival."""
        return (request.arrival,)

    def victim(self, running: Sequence[Request]) -> Request:
        """The youngest."""
        return max(running, key=self.order)


@dataclass(frozen=True, slots=True)
class Priority:
    """Lower priority numbers first, then arrival; the least urgent and youngest yields first."""

    name: str = "priority"

    def order(self, request: Request) -> OrderKey:
        """Priority, then arrival."""
        return (request.priority, request.arrival)

    def victim(self, running: Sequence[Request]) -> Request:
        """The least urgent, and of these the youngest."""
        return max(running, key=self.order)


POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "priority": Priority}


def create_policy(name: str) -> Policy:
    """The policy of this name; raises ValueError with the choices."""
    if name not in POLICIES:
        raise ValueError(f"unknown scheduling policy {name!r}; choose from {', '.join(POLICIES)}")
    return POLICIES[name]()
