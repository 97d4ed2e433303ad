"""How much of a step is computed at once when memory is short: splits steps, shrinks, and recovers.

    plan items   [ a: 1 ][ b: 1 ][ c: positions 0..499                ]
    parts        [ a: 1 ][ b: 1 ][ c: 0..253 ]   [ c: 254..499 ]          tokens at most 256

Arithmetic on plan items; it knows no device and no clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.executor import Items
from penstock.core.plan import PlanItem

_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of one size of a step, which was lowered and comes back by doubling."""

    value: int = _NO_LIMIT
    failed: int = _NO_LIMIT
    """The size that did not fit when there was no limit; when it is reached again, the limit is lifted."""

    def lowered(self, size: int) -> Limit:
        """Half of `size`, which did not fit."""
        return Limit(max(1, size // 2), size if self.value == _NO_LIMIT else self.failed)

    def raised(self) -> Limit:
        """Twice as much, or no limit at all."""
        return Limit() if 2 * self.value >= self.failed else Limit(2 * self.value, self.failed)

    def __str__(self) -> str:
        return "any number of" if self.value == _NO_LIMIT else f"at most {self.value}"


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How much of a plan is computed at once.

    Two sizes matter to memory: positions (activations), and requests (logits and their sampling). A step that
    does not fit halves the first, unless it has one position for each request: then it halves the second, so
    that an excess of logits does not cut prompts into small pieces. From time to time each is doubled, until
    it is gone.
    """

    tokens: Limit = Limit()
    requests: Limit = Limit()
    whole: bool = False
    """Items are not cut: it is their number that is halved."""

    @property
    def active(self) -> bool:
        """Whether any step would be split."""
        return self != StepLimits(whole=self.whole)

    def split(self, items: Sequence[PlanItem]) -> list[Items]:
        """The items in the same order, in as few parts as the limits allow; long items in several pieces.

        Order matters: an item may read blocks that an earlier one fills.
        """
        if len(items) <= self.requests.value and sum(item.tokens for item in items) <= self.tokens.value:
            return [tuple(items)]
        parts: list[Items] = []
        part: list[PlanItem] = []
        room = self.tokens.value
        for item in items:
            rest: PlanItem | None = item
            while rest is not None:
                if room == 0 or len(part) == self.requests.value:
                    parts.append(tuple(part))
                    part, room = [], self.tokens.value
                piece, rest = _cut(rest, room)
                part.append(piece)
                room -= piece.tokens
        parts.append(tuple(part))
        return parts

    def lowered(self, items: Sequence[PlanItem]) -> StepLimits:
        """Limits under which these items, which did not fit, are split; they have more than one token."""
        tokens = sum(item.tokens for item in items)
        if tokens == len(items) or self.whole:
            return dataclasses.replace(self, requests=self.requests.lowered(len(items)))
        return dataclasses.replace(self, tokens=self.tokens.lowered(tokens))

    def smallest(self, items: Sequence[PlanItem]) -> bool:
        """Whether nothing less can be computed than these items."""
        return len(items) == 1 and (self.whole or items[0].tokens == 1)

    def raised(self) -> StepLimits:
        """One step back to where they were."""
        return StepLimits(self.tokens.raised(), self.requests.raised(), self.whole)

    def __str__(self) -> str:
        return f"{self.tokens} tokens and {self.requests} requests"


def _cut(item: PlanItem, room: int) -> tuple[PlanItem, PlanItem | None]:
    """(as much of the item as fits, the rest). Only the last piece is sampled; drafts are not verified in
    pieces, they are dropped: the token before them is an answer, too."""
    if item.tokens <= room:
        return item, None
    if item.drafts:
        return item._replace(tokens=1, samples=1, drafts=()), None
    first = item._replace(tokens=room, samples=0, pools=False)
    return first, item._replace(start=item.start + room, tokens=item.tokens - room)
