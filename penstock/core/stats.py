"""What an engine says of itself after a step: totals since its start, and how things stand.

Totals only grow, so whoever misses a message, or reads every tenth, misses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Totals:
    """Counters since the start."""

    steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix index."""
    prefix_hits: int = 0
    """Tokens found there."""
    prompt_tokens: int = 0
    """Prompt tokens computed for the first time."""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    generation_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens of newly admitted requests found in the prefix index."""
    drafted_tokens: int = 0
    """Drafts that were verified."""
    accepted_tokens: int = 0
    """Those that were right."""
    stored_blocks: int = 0
    """Blocks copied to the host, of requests that were preempted."""
    loaded_blocks: int = 0
    """Blocks copied back."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One engine, after a step."""

    totals: Totals = field(default_factory=Totals)
    running: int = 0
    waiting: int = 0
    deferred: int = 0
    """Of `waiting`: not held up by capacity, but until something else is done (siblings, until their leader
    has computed the prompt)."""
    kv_usage: float = 0.0
    """Share of blocks that are referenced, 0 to 1."""
    host_usage: float = 0.0
    """Share of the host's blocks that hold something of preempted requests, 0 to 1."""
    seconds: float = 0.0
    """Device time of the last step."""
    predicted: float = 0.0
    """What the cost model had predicted for it, in seconds."""
    busy: float = 0.0
    """Device seconds since the start in which steps ran."""
    idle: float = 0.0
    """Device seconds since the start in which none ran."""
    at: float = 0.0
    """When these figures were taken."""
