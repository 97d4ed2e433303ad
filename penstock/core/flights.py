"""Steps under way: planned and submitted, not yet committed, in their order.

Of each it keeps the block tables that its items had. Tables grow in place, and who loses his blocks gets a
new list, so that what a step has written is known even when its request has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from .plan import Plan, StepResult

Standing = tuple[str, int, list[int]]
"""(request, epoch, block table)"""


@dataclass(frozen=True, slots=True)
class Flight:
    """One step; a table for each of the plan's items."""

    plan: Plan
    tables: list[list[int]]

    def standing(self) -> Iterator[Standing]:
        """Each item's."""
        for item, table in zip(self.plan.items, self.tables, strict=True):
            yield item.request, item.epoch, table


class Flights:
    """All of them, the oldest first."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()

    def begin(self, plan: Plan, tables: list[list[int]]) -> None:
        """A step was planned."""
        self._flights.append(Flight(plan, tables))

    def end(self, plan: Plan, result: StepResult) -> Flight:
        """It is to be committed. Raises ValueError unless it is the oldest, and its result has an outcome for
        each item."""
        if not self._flights or self._flights[0].plan is not plan or len(result.outcomes) != len(plan.items):
            count = len(result.outcomes)
            raise ValueError(f"step {plan.step} with {count} outcomes is not the next one to commit")
        return self._flights.popleft()

    def count(self, request: str) -> int:
        """In how many of them a request is."""
        return sum(item.request == request for flight in self._flights for item in flight.plan.items)

    def standing_on(
        self, worthless: Collection[int], ended: Flight, others: Iterable[Standing]
    ) -> list[Standing]:
        """Who has one of these blocks, in the step that has just ended, in one under way, or else; with the
        part of its table that begins there."""
        found = []
        under_way = (flight.standing() for flight in (ended, *self._flights))
        for request, epoch, table in chain(others, *under_way):
            place = next((place for place, block in enumerate(table) if block in worthless), None)
            if place is not None:
                found.append((request, epoch, table[place:]))
        return found
