"""Requests that wait: in order, bounded, and held back while another computes what they will share.

    add ──▶ held ── their leader's prompt is computed, or it is gone ──▶ waiting ── take ──▶
       └────────────────────────────────────────────────────────────────▶┘
                                                       └── overflow: refused, from the end of the order

What it says of itself is counted as requests come and go; nothing here looks at all of them, but for a
refusal (at those it refuses) and a policy whose keys change.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter

from .request import Request, State

_rank = attrgetter("rank")


class Queue:
    """In order of `Request.rank`, which is set before a request comes here."""

    def __init__(self) -> None:
        self._waiting: list[Request] = []
        self.held = 0
        """Requests that wait for their leader."""
        self.fresh = 0
        """Requests that are bounded: never admitted, and no siblings, which stand and fall with their
        leader."""
        self.fresh_tokens = 0
        """Their prompt tokens."""
        self.prompt_tokens = self.max_tokens = 0
        """Of all, those that are held included: tokens of their prompts, and most that they may generate."""

    def __len__(self) -> int:
        """How many may be admitted."""
        return len(self._waiting)

    def __getitem__(self, position: int) -> Request:
        return self._waiting[position]

    def add(self, request: Request) -> None:
        """Put in a new or preempted request; one that is held is only counted."""
        self._weigh(request, 1)
        if request.state is State.HELD:
            self.held += 1
            return
        request.state = State.WAITING
        insort(self._waiting, request, key=_rank)
        self._count(request, 1)

    def release(self, leader: Request) -> None:
        """Let the followers of this request be admitted."""
        followers, leader.followers = leader.followers, []
        self.held -= len(followers)
        for follower in followers:
            self._weigh(follower, -1)
            follower.state = State.WAITING
            self.add(follower)

    def take(self, position: int) -> Request:
        """Remove the one at this place, which is admitted."""
        request = self._waiting.pop(position)
        self._weigh(request, -1)
        self._count(request, -1)
        return request

    def remove(self, request: Request) -> None:
        """Remove a request wherever it is."""
        if request.state is State.HELD:
            if request.leader is not None:
                request.leader.followers.remove(request)
            self.held -= 1
            self._weigh(request, -1)
            return
        self.take(bisect_left(self._waiting, request.rank, key=_rank))

    def sort(self, rank: Callable[[Request], tuple[float, ...]]) -> None:
        """New keys for all."""
        for request in self._waiting:
            request.rank = rank(request)
        self._waiting.sort(key=_rank)

    def overflow(self, most: int | None, most_tokens: int | None) -> list[tuple[Request, str]]:
        """Remove what is over these bounds, the last in order first, with those that follow each: (request,
        the bound at fault)."""
        refused: list[tuple[Request, str]] = []
        position = len(self._waiting)
        while position and self.fresh:
            if most is not None and self.fresh > most:
                bound = "max_num_queued_reqs"
            elif most_tokens is not None and self.fresh_tokens > most_tokens:
                bound = "max_num_queued_tokens"
            else:
                break
            position -= 1
            if _is_fresh(self._waiting[position]):
                request = self.take(position)
                refused += ((each, bound) for each in (request, *request.followers))
                self.held -= len(request.followers)
                for follower in request.followers:
                    self._weigh(follower, -1)
                request.followers.clear()
        return refused

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        ranks = [request.rank for request in self._waiting]
        assert ranks == sorted(ranks)
        assert all(request.state is State.WAITING and not request.blocks for request in self._waiting)
        fresh = [request for request in self._waiting if _is_fresh(request)]
        assert (self.fresh, self.fresh_tokens) == (len(fresh), sum(each.prompt_len for each in fresh))

    def _weigh(self, request: Request, change: int) -> None:
        self.prompt_tokens += change * request.prompt_len
        self.max_tokens += change * request.max_tokens

    def _count(self, request: Request, change: int) -> None:
        if _is_fresh(request):
            self.fresh += change
            self.fresh_tokens += change * request.prompt_len


def _is_fresh(request: Request) -> bool:
    return request.cached is None and request.leader is None
