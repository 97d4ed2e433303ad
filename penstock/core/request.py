"""One sequence of a request under way, as the scheduler sees it: the specification, and all that grows.

There are no phases. A request has a list of known tokens (prompt, then what was generated) and a number of
*computed* ones, whose keys and values lie in its blocks:

    tokens    [ prompt ....................... | generated ......... ]
    computed  [################################|######          ]
              ^ 0                                    ^ computed     ^ len(tokens) (+ pending)
    blocks    [ b0 ][ b1 ][ b2 ][ b3 ][ b4 ]

A step computes some of the rest. When it reaches the last token, the executor samples one more: until its id
is known the request has one *pending* token (several, where drafts are verified). Decode, chunked prefill, a
prefix hit and resuming after a preemption are the same thing with other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .plan import TokenLogprob
from .request_spec import RequestSpec


class State(StrEnum):
    """Where a request stands."""

    HELD = "held"  # waits until its leader has computed the prompt that they share
    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"  # holds nothing; is there until the last step that it was in has been committed


@dataclass(frozen=True, slots=True)
class Swapped:
    """What the host keeps of a preempted request: `core/swap.py`."""

    blocks: tuple[int, ...]
    """Host blocks, in the order of its table."""
    computed: int
    """Tokens whose keys and values are in them."""
    table: tuple[int, ...]
    """Device blocks that they were copied from."""
    step: int
    """The one that copies them: of earlier ones, one may still turn out to have computed nothing."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence under way. The specification's part is read-only; the scheduler owns the rest."""

    spec: RequestSpec
    index: int
    """Which of the specification's sequences it is."""
    id: str
    tokens: list[int]
    """Known ones. Until it is first admitted, one list of the prompt is that of all siblings. A request that
    another engine had begun has generated some before it comes."""
    stops: frozenset[int]
    """Token ids that end it; one set for all of the specification's sequences."""
    prompt_len: int = field(init=False)
    max_tokens: int = field(init=False)
    max_len: int = field(init=False)
    """Longest that `tokens` can become."""
    leader: Request | None = None
    """The request whose prompt this one shares (n > 1)."""
    followers: list[Request] = field(default_factory=list)
    """Requests that wait until this one has computed its prompt."""

    # ---- where it stands ----
    state: State = State.WAITING
    arrival: int = -1
    """Number given by the scheduler: the tie-breaker of every order."""
    rank: tuple[float, ...] = ()
    """The policy's sort key."""
    epoch: int = -1
    """Number of its admission; no result of an earlier one reaches a later one."""
    inflight: int = 0
    """Steps that it is in and that are not committed."""

    # ---- progress ----
    computed: int = 0
    pending: int = 0
    """Positions whose sampled tokens are not known yet."""
    speculating: bool = False
    """Drafts are being verified, so that nobody knows how many of them come next."""
    blocks: list[int] = field(default_factory=list)
    """Its block table. The list is never emptied: a step under way still sees what it was."""
    hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of `tokens`, filled as far as needed."""
    registered: int = 0
    """Number of leading blocks that were offered to the prefix index."""
    swapped: Swapped | None = None
    """What the host keeps of it since it was preempted."""
    reached: int = 0
    """Most tokens that were ever computed at once: what is below is computed again after a preemption."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """What has come of them so far."""

    # ---- figures ----
    cached: int | None = None
    """Prompt tokens found in the prefix cache at first admission; None before it."""
    preemptions: int = 0
    device_seconds: float = 0.0
    scheduled_at: float | None = None

    def __post_init__(self) -> None:
        prompt = self.spec.prompt_of(self.index)
        self.prompt_len = len(prompt.token_ids)
        self.max_tokens = prompt.max_tokens
        self.max_len = self.prompt_len + self.max_tokens

    @classmethod
    def of(cls, spec: RequestSpec) -> list[Request]:
        """The sequences of a specification, each prompt's first one before its siblings, which follow it.

        What they have in common is made once: a request of thousands of sequences is not to weigh thousands
        of times its prompt and its lists of ids.
        """
        sampling = spec.sampling
        # a grammar says itself where the output may end, and where it must
        goes_on = sampling is None or (sampling.ignore_eos and spec.grammar is None)
        ends = () if goes_on else spec.eos_ids
        stops = frozenset((*ends, *(sampling.stop_token_ids if sampling is not None else ())))
        requests: list[Request] = []
        ids = iter(spec.ids)
        for first, prompt in zip(range(0, len(spec.prompts) * spec.n, spec.n), spec.prompts, strict=True):
            tokens = [*prompt.token_ids, *prompt.generated]
            leader = cls(spec, first, next(ids), tokens, stops)
            requests.append(leader)
            for index in range(first + 1, first + spec.n):
                request = cls(spec, index, next(ids), tokens, stops, leader=leader, state=State.HELD)
                leader.followers.append(request)
                requests.append(request)
        return requests

    @property
    def shares(self) -> bool:
        """Whether siblings have its prompt, too."""
        return self.spec.n > 1

    @property
    def generated(self) -> int:
        """Number of generated tokens whose ids are known."""
        return len(self.tokens) - self.prompt_len

    @property
    def target(self) -> int:
        """Number of tokens to have computed before the next one can be sampled."""
        return len(self.tokens) + self.pending

    @property
    def prompt_is_computed(self) -> bool:
        """Whether the followers find the prompt in the prefix index."""
        return self.computed >= self.prompt_len or len(self.tokens) > self.prompt_len
