"""Who is here, and where each stands: the ways of a request from its arrival to its last event.

              ┌──────────── send_back ◀───────────┐
              ▼                                   │
    enter ─▶ queue (held, waiting) ─▶ run ─▶ running ─▶ finish ─▶ (leaving) ─▶ last event
                     └─────────────────────────────────────▲

A finished request is here until the last step that it was in has been committed: then its bill is whole. It
knows blocks as something to be given back; who runs, and when, is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from operator import attrgetter

from .blocks import BlockPool
from .plan import Event
from .policy import Policy, View, is_background
from .queue import Queue
from .request import Request, State
from .request_spec import FinishReason
from .swap import Swaps

_rank = attrgetter("rank")
NO_EPOCH = -1


class Roll:
    """All requests of one scheduler.

    Attributes:
        requests: by id, in order of arrival.
        queue: those that wait.
        running: those that hold blocks, in order.
        released: whom the executor has to let go with the next plan.
        view: what the policy may look at besides a request.
    """

    def __init__(self, pool: BlockPool, policy: Policy, swaps: Swaps) -> None:
        self.requests: dict[str, Request] = {}
        self.queue = Queue()
        self.running: list[Request] = []
        self.released: list[str] = []
        self.view = View()
        self.background = 0
        """How many nobody waits for."""
        self._pool = pool
        self._policy = policy
        self._swaps = swaps
        self._arrivals = 0
        self._endings: dict[str, Event] = {}
        """Last events of requests that are still in a step under way."""
        self._tenants: Counter[str] = Counter()
        """Requests of each, under a dynamic policy."""

    def enter(self, request: Request) -> None:
        """A new one."""
        request.arrival = self._arrivals
        self._arrivals += 1
        if self._policy.dynamic:
            # whoever comes anew is not owed what others had before he was here
            served, tenant = self.view.served, request.spec.tenant
            served.setdefault(tenant, min(served.values(), default=0.0))
            self._tenants[tenant] += 1
        request.rank = self._order(request)
        self.requests[request.id] = request
        self.background += is_background(request)
        self.queue.add(request)

    def sort(self) -> None:
        """New ranks for all, if the policy's change."""
        if self._policy.dynamic:
            for request in self.running:
                request.rank = self._order(request)
            self.running.sort(key=_rank)
            self.queue.sort(self._order)

    def run(self, request: Request, epoch: int) -> None:
        """It was taken from the queue, and has got blocks."""
        request.state = State.RUNNING
        request.epoch = epoch
        insort(self.running, request, key=_rank)

    def send_back(self, request: Request) -> None:
        """A running one yields its blocks, and waits again."""
        self._drop_blocks(request)
        self.queue.add(request)

    def start_over(self, request: Request) -> None:
        """It stands on worthless ground: another step computes what is under way again, from the queue."""
        _forget(request)
        self._swaps.drop(request)
        if request.state is State.RUNNING:
            self.send_back(request)

    def finish(self, request: Request, event: Event) -> Event | None:
        """It has ended. Its last event, or None if that waits for a step under way."""
        self._swaps.drop(request)
        if request.state is State.RUNNING:
            self._drop_blocks(request)
        else:
            self.queue.remove(request)
        self.queue.release(request)
        request.state = State.FINISHED
        request.pending = 0
        self._endings[request.id] = event
        return None if request.inflight else self.last_event(request)

    def last_event(self, request: Request) -> Event:
        """Of a finished one whose last step is committed, with all figures."""
        self.depart(request)
        return self._endings.pop(request.id)._replace(
            scheduled_at=request.scheduled_at,
            cached=request.cached or 0,
            device_seconds=request.device_seconds,
            preemptions=request.preemptions,
        )

    def last_events(self) -> list[Event]:
        """Of all that are here, as if each had ended now; what is under way is not in their figures."""
        for request in self.requests.values():
            self._endings.setdefault(
                request.id, Event(request.id, finish=FinishReason.ABORT, at=self.view.now)
            )
        return [self.last_event(request) for request in list(self.requests.values())]

    def depart(self, request: Request) -> None:
        """Strike it off; it holds nothing and is in no queue."""
        request.state = State.FINISHED
        del self.requests[request.id]
        self.background -= is_background(request)
        if self._policy.dynamic:
            tenant = request.spec.tenant
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant], self.view.served[tenant]

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self._pool.check(request.blocks for request in self.running)
        self.queue.check()
        self._swaps.check(self.requests.values())
        assert self.background == sum(map(is_background, self.requests.values()))
        waiting, leaving = len(self.queue) + self.queue.held, len(self._endings)
        assert len(self.running) + waiting + leaving == len(self.requests)
        queued = [each for each in self.requests.values() if each.state in (State.WAITING, State.HELD)]
        assert self.queue.prompt_tokens == sum(each.prompt_len for each in queued)
        assert self.queue.max_tokens == sum(each.max_tokens for each in queued)
        ranks = [request.rank for request in self.running]
        assert ranks == sorted(ranks)
        for request in self.requests.values():
            finished = request.state is State.FINISHED
            assert finished == (request.id in self._endings)
            assert not finished or request.inflight
            assert 0 <= request.computed <= request.target
            assert request.pending >= 0
            assert not request.pending or request.inflight
            assert finished or request.generated + request.pending <= request.max_tokens
            assert len(request.blocks) * self._pool.block_size >= request.computed
            assert (request.state is State.RUNNING) == (request in self.running)
            assert request.state is State.RUNNING or not request.blocks

    def _order(self, request: Request) -> tuple[float, ...]:
        return self._policy.order(request, self.view)

    def _drop_blocks(self, request: Request) -> None:
        place = bisect_left(self.running, request.rank, key=_rank)
        if self.running[place] is not request:
            name = self._policy.name
            raise RuntimeError(f"policy {name} gives two requests the same place: {request.rank}")
        del self.running[place]
        self._pool.release(request.blocks)
        request.blocks = []  # not emptied: a step under way may still hold it
        request.computed = 0
        request.registered = 0
        request.state = State.WAITING
        self.released.append(request.id)
        if not request.pending:  # else it is owed the token that is under way, and what comes with it
            _forget(request)


def _forget(request: Request) -> None:
    """No result of a step under way reaches it any more."""
    request.epoch = NO_EPOCH
    request.pending = 0
    request.speculating = False
    request.prompt_logprobs.clear()
