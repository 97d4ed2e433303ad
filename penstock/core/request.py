"""A request as the scheduler sees it: token ids, counts, limits, and where it stands.

There are no phases. A request has a list of known tokens (prompt, then what was generated) and a number of
*computed* ones, whose keys and values lie in its blocks:

    tokens    [ prompt ....................... | generated ......... ]
    computed  [################################|######          ]
              ^ 0                                    ^ computed     ^ len(tokens) (+ pending)
    blocks    [ b0 ][ b1 ][ b2 ][ b3 ][ b4 ]

A step computes some of the rest. When it reaches the last token, the executor samples one more: until its id
is known the request has one *pending* token. Decode, chunked prefill, a prefix hit and resuming after a
preemption are the same thing with other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .sampling_params import SamplingParams


class State(StrEnum):
    """Where a request stands."""

    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"  # holds nothing


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's finish_reason values."""

    STOP = "stop"  # end-of-sequence or stop token, or a stop string (found by the text layer)
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the client went away, or the server is shutting down
    ERROR = "error"  # it failed in the engine; the event says why


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate. All times are seconds of the caller's clock, given as `now`."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    """End-of-sequence ids of the model; empty when the request ignores them."""
    max_tokens: int = 16
    """Most tokens to generate, already cut to the context length."""
    priority: int = 0
    """Lower is served first, under the priority policy."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    leader: str | None = None
    """With n > 1: the request whose prompt this one shares; it waits for the leader to compute the prompt."""

    # ---- progress, owned by the scheduler ----
    arrival: int = -1
    """Arrival number, given by the scheduler: the tie-breaker of every order."""
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of `tokens`, filled as far as needed."""
    registered: int = 0
    """Number of leading blocks that were offered to the prefix index."""
    reached: int = 0
    """Most tokens that were ever computed at once: what is below is computed again after a preemption."""
    has_siblings: bool = False
    """Another request shares this one's prompt (n > 1)."""
    cached: int | None = None
    """Prompt tokens found in the prefix cache at first admission; None before it."""
    preemptions: int = 0
    device_seconds: float = 0.0

    # ---- times ----
    arrived_at: float = 0.0
    scheduled_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def prompt_len(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt)

    @property
    def generated(self) -> int:
        """Number of generated tokens whose ids are known."""
        return len(self.tokens) - len(self.prompt)

    @property
    def target(self) -> int:
        """Number of tokens to have computed before the next one can be sampled."""
        return len(self.tokens) + self.pending

    @property
    def max_len(self) -> int:
        """Longest that `tokens` can become."""
        return len(self.prompt) + self.max_tokens
