"""A checklist: points that look at what was seen of something, and say how it stands and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Seen = TypeVar("Seen")


class Verdict(StrEnum):
    """How a point stands."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Point:
    """One point, looked at."""

    id: str
    list: str
    """The checklist: health, memory or throughput."""
    title: str
    value: str
    """What was found."""
    verdict: Verdict
    advice: str = ""
    """What to do; empty where there is nothing to do."""


Found = tuple[str, Verdict, str]
"""(what was found, how that stands, what to do)"""


class Checklist(Generic[Seen]):
    """Points that are pure functions of `Seen`, in the order in which they are shown."""

    def __init__(self) -> None:
        self.points: list[tuple[str, str, str, Callable[[Seen], Found]]] = []

    def point(
        self, id: str, list_: str, title: str
    ) -> Callable[[Callable[[Seen], Found]], Callable[[Seen], Found]]:
        """Decorates a function that is a point."""

        def add(check: Callable[[Seen], Found]) -> Callable[[Seen], Found]:
            self.points.append((id, list_, title, check))
            return check

        return add

    def examine(self, seen: Seen) -> list[Point]:
        """All points."""
        return [Point(id, list_, title, *check(seen)) for id, list_, title, check in self.points]
