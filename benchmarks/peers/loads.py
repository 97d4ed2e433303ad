"""What is sent: the loads, and their prompts as token ids.

A load is closed loop: `concurrency` requests are kept in flight until all were sent. Lengths belong to the
load and are the same in every round; token ids are drawn anew for every round, so that no engine profits from
what its prefix cache kept of an earlier one. Every engine gets the same prompts in the same order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from penstock.bench.prompts import Prompt

FIRST_TOKEN_ID, VOCABULARY = 100, 8000
"""Ids are drawn from this range: above the special tokens, below every vocabulary used here."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths in tokens: a log-normal distribution cut to a range."""

    median: int
    sigma: float
    """Standard deviation of the logarithm."""
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return min(self.high, max(self.low, round(rng.lognormvariate(math.log(self.median), self.sigma))))


@dataclass(frozen=True, slots=True)
class Load:
    """One closed-loop load; lengths in tokens."""

    id: str
    title: str
    concurrency: int
    requests: int
    input_len: int | LogNormal
    """Tokens of a prompt that differ from request to request."""
    output_len: int | LogNormal
    shared_len: int = 0
    """Tokens in front of every prompt, the same for all requests of a round."""

    def prompts(self, seed: int) -> list[Prompt]:
        """The requests of round `seed`, in the order of sending."""
        lengths, ids = random.Random(self.id), random.Random(f"{self.id}:{seed}")
        shared = _tokens(ids, self.shared_len)
        prompts = []
        for _ in range(self.requests):
            content = shared + _tokens(ids, _length(self.input_len, lengths))
            prompts.append(Prompt(content, _length(self.output_len, lengths), len(content)))
        return prompts

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


def _length(length: int | LogNormal, rng: random.Random) -> int:
    return length.draw(rng) if isinstance(length, LogNormal) else length


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN_ID, VOCABULARY) for _ in range(count)]


def _by_id(*loads: Load) -> Mapping[str, Load]:
    return {load.id: load for load in loads}


LOADS = _by_id(
    Load("c1", "1 request, 128 in / 64 out", 1, 8, 128, 64),
    Load("c8", "8 requests, 128 in / 64 out", 8, 32, 128, 64),
    Load("c32", "32 requests, 128 in / 64 out", 32, 64, 128, 64),
    Load("c64", "64 requests, 128 in / 64 out", 64, 128, 128, 64),
    Load("long-c1", "1 request, 1,000 in / 100 out", 1, 4, 1000, 100),
    Load("long-c8", "8 requests, 1,000 in / 100 out", 8, 16, 1000, 100),
    Load(
        "mixed-c32",
        "32 requests, log-normal lengths",
        32,
        64,
        LogNormal(median=128, sigma=0.8, low=16, high=1024),
        LogNormal(median=48, sigma=0.6, low=8, high=192),
    ),
    Load("shared-c8", "8 requests, 800 shared + 64 own in / 64 out", 8, 32, 64, 64, shared_len=800),
)
"""Sized so that each takes 20 to 90 s at 20 tok/s for one request and 100 for 32."""

QUICK = _by_id(
    Load("c1", "1 request, 32 in / 8 out", 1, 2, 32, 8),
    Load("c8", "8 requests, 32 in / 8 out", 8, 16, 32, 8),
    Load("long-c1", "1 request, 200 in / 8 out", 1, 2, 200, 8),
    Load(
        "mixed-c32",
        "8 requests, log-normal lengths",
        8,
        16,
        LogNormal(median=32, sigma=0.8, low=4, high=100),
        LogNormal(median=8, sigma=0.6, low=2, high=16),
    ),
    Load("shared-c8", "4 requests, 64 shared + 8 own in / 8 out", 4, 8, 8, 8, shared_len=64),
)
"""The same names with a tiny model: whether the harness works, in a minute."""

WARM_UP = Load("warm-up", "before the measured loads of an engine", 16, 16, 128, 8)
WARM_UP_SINGLE = Load("warm-up", "before the measured loads of an engine", 1, 2, 128, 8)
TUNING = Load("tuning", "to choose between settings", 1, 1, 1000, 64)

THROUGHPUT_CURVE = ("c1", "c8", "c32", "c64")
"""The loads that differ in concurrency only."""
