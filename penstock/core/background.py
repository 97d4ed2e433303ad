"""What a step leaves to work that nobody waits for, in predicted seconds.

    the step's bound          ├─────────────────────────────────┤   of policy.Slo
    what somebody waits for   ├── fixed ── its items ──┤
    left                                               ├─ left ─┤   tokens of background requests go here

Where nobody is waited for in the step, the first background item may take it all, and at least one token is
computed: such work goes on, however short steps are to be. Pure arithmetic on the cost model's coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from .cost import Coefficients
from .plan import Plan, PlanItem
from .policy import Slo


class Leftover:
    """Of one step."""

    def __init__(self, slo: Slo, costs: Coefficients, items: Sequence[PlanItem]) -> None:
        """items: of requests that somebody waits for, already planned."""
        self._costs = costs
        self._free = not items
        """Whether the step is all background's, and nothing of it is planned yet."""
        used = 0.0
        if items:
            load = Plan(0, items=tuple(items)).load
            used = costs.fixed + self._cost(load.tokens, load.context, load.samples)
        decodes = any(item.samples and item.tokens == item.samples for item in items)
        self.seconds = slo.left(used, decodes=decodes)

    def decode(self, position: int) -> bool:
        """Take the next token of a request that has so many computed; False if there is no room."""
        return self._take(self._cost(1, position + 1, 1))

    def chunk(self, position: int, most: int, *, whole: bool = False) -> int:
        """Take up to so many tokens of a prompt, from this position on; all or none where it is `whole`."""
        if most <= 0:
            return 0
        if self.seconds == inf:
            return most
        low, high = 0, most  # the most tokens whose cost fits
        while low < high:
            middle = (low + high + 1) // 2
            if self._of_chunk(position, middle) <= self.seconds:
                low = middle
            else:
                high = middle - 1
        count = low if low == most or not whole else 0
        if not count and self._free:
            count = most if whole else 1
        if count:
            self._take(self._of_chunk(position, count), forced=True)
        return count

    def _of_chunk(self, position: int, count: int) -> float:
        return self._cost(count, count * position + count * (count + 1) // 2, 1)

    def _cost(self, tokens: int, context: int, samples: int) -> float:
        costs = self._costs
        return tokens * costs.per_token + context * costs.per_context + samples * costs.per_sample

    def _take(self, seconds: float, *, forced: bool = False) -> bool:
        if seconds > self.seconds and not (forced or self._free):
            return False
        self.seconds -= seconds
        self._free = False
        return True
