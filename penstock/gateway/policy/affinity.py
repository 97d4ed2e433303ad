"""Which replica gets a request: the one that has its prefix, unless it has more to do than the others.

    prompt bytes ─▶ chained hashes of blocks ─▶ longest prefix that went to a replica lately
    load = requests under way there + queue that it reports, against its weight and its cache pressure

A replica is *eligible* while its load with this request is at most 1.25 times the mean, rounded up, plus one
(bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018): a hot prefix spills over to the others, which then
have it, too. Among the eligible the longest match wins, then the least load, then the draw. Sessions that
stick do so by rendezvous hashing, within twice that bound.

The gateway has no tokenizer; blocks are of bytes. Of a prompt, as of its tokens, equal beginnings have equal
hashes, and that is all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

BLOCK = 256
"""Bytes: some 64 tokens of prose."""
MOST_BLOCKS = 128
"""Of a prompt that are looked at."""
REMEMBERED = 8192
"""Blocks of a replica."""
SLACK = 1.25


def prefix_hashes(prompt: bytes, salt: bytes = b"") -> tuple[bytes, ...]:
    """Chained hashes of the whole blocks of a prompt. `salt`: who shares a cache (model and tenant)."""
    hashes: list[bytes] = []
    parent = blake2b(salt, digest_size=8).digest()
    for start in range(0, min(len(prompt) - BLOCK + 1, BLOCK * MOST_BLOCKS), BLOCK):
        parent = blake2b(parent + prompt[start : start + BLOCK], digest_size=8).digest()
        hashes.append(parent)
    return tuple(hashes)


@dataclass(slots=True)
class Prefixes:
    """Blocks that went to a replica lately; the one not used for longest is forgotten first."""

    most: int = REMEMBERED
    _blocks: dict[bytes, None] = field(default_factory=dict)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that it has."""
        blocks = self._blocks
        for number, each in enumerate(hashes):
            if each not in blocks:
                return number
        return len(hashes)

    def add(self, hashes: Sequence[bytes]) -> None:
        """A prompt goes there."""
        blocks = self._blocks
        for each in reversed(hashes):  # the first block is the newest: chains are forgotten from their end
            blocks.pop(each, None)
            blocks[each] = None
        while len(blocks) > self.most:
            del blocks[next(iter(blocks))]

    def clear(self) -> None:
        """The replica starts anew, with an empty cache."""
        self._blocks.clear()

    def __len__(self) -> int:
        return len(self._blocks)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as it stands."""

    id: str
    in_flight: int
    """Requests of this gateway."""
    most: int
    """That it may have at a time."""
    weight: float
    """Of its health; 0 is out."""
    waiting: float = 0.0
    """Requests in its queue, as it reports."""
    kv_usage: float = 0.0
    """Share of its cache in use."""
    matched: int = 0
    """Leading blocks of the prompt that it has."""

    @property
    def load(self) -> float:
        """Requests, in terms of a healthy replica with room in its cache."""
        pressure = 1.0 + max(0.0, self.kv_usage - 0.9) * 10.0
        return (self.in_flight + self.waiting) * pressure / max(self.weight, 0.01)


def choose(candidates: Sequence[Candidate], draw: float, session: str | None = None) -> int | None:
    """Index of the one to ask; None where nobody can take a request.

    Args:
        candidates: replicas of one model. Where the health of all is bad, all of those that are not full are
            asked again: better a bad chance than none.
        draw: a number of [0, 1), for ties.
        session: what sticks to a replica.
    """
    free = [index for index, each in enumerate(candidates) if each.in_flight < each.most]
    well = [index for index in free if candidates[index].weight > 0]
    among = well or free
    if len(among) <= 1:
        return among[0] if among else None
    loads = {index: candidates[index].load for index in among}
    bound = math.ceil(SLACK * (sum(loads.values()) + 1) / len(among)) + 1
    if session is not None:
        ranked = sorted(among, key=lambda index: _rank(session, candidates[index].id))
        for index in ranked:
            if loads[index] + 1 <= 2 * bound:
                return index
    eligible = [index for index in among if loads[index] + 1 <= bound] or among
    best = min((-candidates[index].matched, loads[index]) for index in eligible)
    tied = [index for index in eligible if (-candidates[index].matched, loads[index]) == best]
    return tied[int(draw * len(tied))]


def _rank(session: str, id: str) -> bytes:
    return blake2b(f"{session}\0{id}".encode(), digest_size=8).digest()
