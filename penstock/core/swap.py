"""Keys and values of preempted requests in the host's memory, as the scheduler sees it: numbered blocks.

A victim loses its blocks. What was computed into them is computed again, or copied to the host and back:

    preemption   device blocks of the table ──▶ host blocks     Plan.swap_out, before anything else of a step
    resumption   host blocks ──▶ new device blocks              Plan.swap_in, after that, before it computes
                 (but for those that the prefix index still finds on the device)

Which of the two is chosen for each victim by what the cost model predicts: two copies of each block against
the tokens and their context. Copies happen in the order of the steps, like everything on a device: so tokens
that are computed by a step under way are copied, too, and a host block may be used again as soon as a plan
has read it.

It knows no device: host block ids index whatever memory the executor has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

from .cost import StepCost
from .flights import Standing
from .plan import Copy
from .request import Request, Swapped


class Swaps:
    """The host's blocks, and whose they are.

    Args:
        num_blocks: how many there are; with none, everything is computed again.
        block_size: tokens per block.
        cost: what copies and computing take.
    """

    def __init__(self, num_blocks: int, block_size: int, cost: StepCost) -> None:
        self.num_blocks = num_blocks
        self._block_size = block_size
        self._cost = cost
        self.reset()

    def reset(self) -> None:
        """All blocks are free."""
        self._free = list(range(self.num_blocks))
        heapify(self._free)
        self._kept: dict[str, Request] = {}
        self._out: list[Copy] = []

    @property
    def usage(self) -> float:
        """Share of the blocks that hold something, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks if self.num_blocks else 0.0

    def worth(self, request: Request) -> bool:
        """Whether a running request that is to yield should be copied. Raises nothing, changes nothing."""
        count = self._blocks(request.computed)
        if not 0 < count <= len(self._free) or request.computed >= request.target or request.speculating:
            return False
        if request.spec.sampling is None:  # a vector may hang on every position
            return False
        if not request.generated and request.spec.prompt_logprobs_of(request.index) is not None:
            return False  # what was told of the prompt so far is lost with the preemption
        return self._cost.copied(2 * count) < self._cost.recomputed(request.computed)

    def out(self, request: Request, step: int) -> int:
        """Keep what a request has computed; the next plan, which is `step`, copies it. Returns the blocks.

        The lowest ones first: they lie together in memory.
        """
        count = self._blocks(request.computed)
        blocks = tuple(heappop(self._free) for _ in range(count))
        table = tuple(request.blocks[:count])
        request.swapped = Swapped(blocks, request.computed, table, step)
        self._kept[request.id] = request
        self._out += zip(table, blocks, strict=True)
        return count

    def take_out(self) -> tuple[Copy, ...]:
        """Copies to the host that no plan has yet."""
        out, self._out = tuple(self._out), []
        return out

    def back(self, request: Request, found: int) -> tuple[Copy, ...]:
        """It is admitted again, with a table whose first `found` blocks hold what they should: copies that
        fill the others, as far as it was computed."""
        kept = request.swapped
        if kept is None:
            return ()
        self._release(request, kept)
        request.computed = max(request.computed, kept.computed)
        return tuple(zip(kept.blocks[found:], request.blocks[found:], strict=False))

    def drop(self, request: Request) -> None:
        """What was kept of it is of no use; also where nothing was."""
        if request.swapped is not None:
            gone = set(request.swapped.blocks)
            self._out = [copy for copy in self._out if copy[1] not in gone]
            self._release(request, request.swapped)

    def standing(self, step: int) -> Iterator[Standing]:
        """(request, epoch, blocks) of what was copied after this step had been planned: as good as its blocks
        were then."""
        for request in self._kept.values():
            if request.swapped is not None and request.swapped.step > step:
                yield request.id, request.epoch, list(request.swapped.table)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError if an invariant is broken; `requests` are all that are here."""
        kept = [request for request in requests if request.swapped is not None]
        assert {request.id for request in kept} == set(self._kept)
        held = [block for request in kept if request.swapped for block in request.swapped.blocks]
        assert sorted([*held, *self._free]) == list(range(self.num_blocks))
        assert all(block in held for _, block in self._out)
        for request in kept:
            assert request.swapped is not None
            assert not request.blocks
            assert len(request.swapped.blocks) == self._blocks(request.swapped.computed)
            assert request.swapped.computed < request.target

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _release(self, request: Request, kept: Swapped) -> None:
        for block in kept.blocks:
            heappush(self._free, block)
        request.swapped = None
        del self._kept[request.id]
