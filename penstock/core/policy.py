"""Who goes first, and who yields: pure functions of requests and time.

A policy knows requests, the time, and what each tenant has had; it does not know blocks, plans or devices.
Every order ends in the arrival number, so no two requests ever tie and the same input gives the same plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
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


@dataclass(frozen=True, slots=True)
class Slo:
    """What those who wait are promised, as far as a step can keep it. Seconds; None where nothing is."""

    ttft: float | None = None
    """Until the first token."""
    itl: float | None = None
    """Between two tokens."""

    def left(self, used: float, *, decodes: bool) -> float:
        """Predicted seconds of a step for work that nobody waits for, beside `used` seconds for those who do.

        A gap between two tokens is the step in which the second is computed: it is to stay within the ITL,
        with a margin for what the prediction does not know. A request that comes during a step waits for its
        end: background may make that wait longer by a small share of the TTFT.
        """
        left = inf if self.ttft is None else TTFT_SHARE * self.ttft
        if decodes and self.itl is not None:
            left = min(left, ITL_SHARE * self.itl - used)
        return max(left, 0.0)


TTFT_SHARE = 0.07
"""Of the TTFT: how much longer background may make a step. It and the next were chosen by
benchmarks/background.py."""
ITL_SHARE = 0.5
"""Of the ITL: the longest step with background in it. A longer step gathers more prompts for the next one,
which is then longer without any background: hence the margin."""


def is_background(request: Request) -> bool:
    """Whether nobody waits for it."""
    return request.spec.service_class is ServiceClass.BACKGROUND


class _LastYields:
    """Whoever goes last yields first."""

    dynamic = False

    def victim(self, running: Sequence[Request], view: View) -> Request:
        """The last in order."""
        return running[-1]


@dataclass(frozen=True)
class Fcfs(_LastYields):
    """First come, first served, what nobody waits for behind everything else; the last in that order yields
    first."""

    name: str = "fcfs"

    def order(self, request: Request, view: View) -> OrderKey:
        """Class, arrival."""
        return (is_background(request), request.arrival)


@dataclass(frozen=True)
class Priority(_LastYields):
    """What somebody waits for before what nobody does, then lower priority numbers, then arrival; the least
    urgent and youngest yields first."""

    name: str = "priority"

    def order(self, request: Request, view: View) -> OrderKey:
        """Class, priority, arrival."""
        return (is_background(request), request.spec.priority, request.arrival)


POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "priority": Priority}


def create_policy(name: str) -> Policy:
    """The policy of this name; raises ValueError with the choices."""
    if name not in POLICIES:
        raise ValueError(f"unknown scheduling policy {name!r}; choose from {', '.join(POLICIES)}")
    return POLICIES[name]()
