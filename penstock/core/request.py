"""What a client asked for, once and frozen; and what became of each of its sequences so far.

    RequestSpec   one request of a client: prompts once, parameters once, n. Travels whole, from whoever
                  encodes it to the executor; nobody copies it field by field.
    Request       one of its sequences (prompts × n of them) as the scheduler sees it: the specification, an
                  index into it, and everything that grows. `Request.of(spec)` is where they are made.

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

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from .errors import InvalidRequest
from .sampling_params import Sampling

if TYPE_CHECKING:
    from .plan import TokenLogprob


class State(StrEnum):
    """Where a request stands."""

    HELD = "held"  # waits until its leader has computed the prompt that they share
    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"  # holds nothing; is there until the last step that it was in has been committed


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's finish_reason values."""

    STOP = "stop"  # end-of-sequence or stop token, or a stop string (found by the text layer)
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the client went away, or the server is shutting down
    ERROR = "error"  # it failed in the engine; the event says why


class ServiceClass(StrEnum):
    """Who waits for it: what a policy may put first."""

    REALTIME = "realtime"
    BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class InputSpan:
    """Positions of a prompt that stand for something else than their token ids, such as an image."""

    start: int
    length: int
    digest: str
    """Hash of the content: prefixes are equal only where these are, too."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: tuple[int, ...]
    max_tokens: int = 16
    """Most tokens to generate, already cut to the context length; 0 where nothing is (pooling)."""
    inputs: tuple[InputSpan, ...] = ()
    """In ascending order."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """One vector of the whole prompt is wanted, and no token."""

    type: str = "last"
    """"last": the hidden state of the last position, after the final norm."""
    normalize: bool = True
    """To length 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One request of a client, as it travels. All times are seconds of the engine's clock."""

    id: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling | None = None
    """Of a request that generates; shared by all of its sequences."""
    pooling: Pooling | None = None
    """Of a request that does not."""
    n: int = 1
    """Sequences of each prompt."""
    arrived_at: float = 0.0
    priority: int = 0
    """Lower is served first, under the priority policy."""
    service_class: ServiceClass = ServiceClass.REALTIME
    deadline: float | None = None
    """When the answer is wanted: for policies, nothing is ended by it."""
    tenant: str = ""
    """Whose it is. Tenants share no cached prefixes; policies may share the device between them."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    adapter: str | None = None
    """Id of a LoRA adapter: other keys and values, so other prefixes."""
    grammar: str | None = None
    """Id of a compiled grammar that restricts the tokens."""
    eos_ids: tuple[int, ...] = ()
    """End-of-sequence ids, ascending; the engine fills them in."""
    drawn_seed: int | None = None
    """For a request that samples without a seed: the engine draws one, so that it goes on with the same
    numbers after a preemption, and a replay is the same."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of its sequences, prompt by prompt."""
        count = len(self.prompts) * self.n
        return (self.id,) if count == 1 else tuple(f"{self.id}:{index}" for index in range(count))

    @property
    def needs(self) -> frozenset[str]:
        """What an executor must be able to do for it, beyond tokens and logprobs (`Capacity.features`)."""
        wanted = {
            "pooling": self.pooling is not None,
            "adapter": self.adapter is not None,
            "grammar": self.grammar is not None,
            "inputs": any(prompt.inputs for prompt in self.prompts),
        }
        return frozenset(name for name, needed in wanted.items() if needed)

    @property
    def salt(self) -> str:
        """What separates its cached prefixes from those of others."""
        return repr((self.tenant, self.adapter, self.cache_salt))

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of sequence `index`."""
        return self.prompts[index // self.n]

    def seed_of(self, index: int) -> int | None:
        """The seed of sequence `index`: those of one prompt differ. None for greedy and pooling requests."""
        if self.sampling is None or self.sampling.greedy:
            return None
        given = self.sampling.seed
        if given is not None:
            return _in_64_bits(given + index % self.n)
        return None if self.drawn_seed is None else _in_64_bits(self.drawn_seed + index)

    def prompt_logprobs_of(self, index: int) -> int | None:
        """How many logprobs of its prompt sequence `index` gives: the first of n computes it, the others
        share."""
        return None if self.sampling is None or index % self.n else self.sampling.prompt_logprobs

    def check(self) -> None:
        """Raise InvalidRequest for what can never be served anywhere."""
        if (self.sampling is None) == (self.pooling is None):
            raise InvalidRequest("a request either samples or pools: give one of the two.")
        if not self.prompts or self.n < 1:
            raise InvalidRequest(
                f"a request needs a prompt and n of at least 1, got {len(self.prompts)} and {self.n}.",
                param="prompt" if not self.prompts else "n",
            )
        for prompt in self.prompts:
            if not prompt.token_ids:
                raise InvalidRequest("the prompt is empty.", param="prompt")
            if (prompt.max_tokens > 0) == (self.sampling is None):
                raise InvalidRequest(
                    f"max_tokens is {prompt.max_tokens}: a request that samples needs 1 or more, "
                    "one that pools 0.",
                    param="max_tokens",
                )


def _in_64_bits(seed: int) -> int:
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return 0 if wrapped == -1 else wrapped  # -1 would mean no seed


@dataclass(slots=True, eq=False)
class Request:
    """One sequence under way. The specification's part is read-only; the scheduler owns the rest."""

    spec: RequestSpec
    index: int
    """Which of the specification's sequences it is."""
    id: str
    prompt_len: int = field(init=False)
    max_tokens: int = field(init=False)
    max_len: int = field(init=False)
    """Longest that `tokens` can become."""
    stops: frozenset[int] = field(init=False)
    """Token ids that end it."""
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
    tokens: list[int] = field(init=False)
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
    reached: int = 0
    """Most tokens that were ever computed at once: what is below is computed again after a preemption."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """What has come of them so far."""

    # ---- figures ----
    cached: int | None = None
    """Prompt tokens found in the prefix cache at first admission; None before it."""
    preemptions: int = 0
    device_seconds: float = 0.0
    arrived_at: float = field(init=False)
    scheduled_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        prompt, sampling = self.spec.prompt_of(self.index), self.spec.sampling
        self.tokens = list(prompt.token_ids)
        self.prompt_len = len(prompt.token_ids)
        self.max_tokens = prompt.max_tokens
        self.max_len = self.prompt_len + self.max_tokens
        ends = () if sampling is None or sampling.ignore_eos else self.spec.eos_ids
        self.stops = frozenset((*ends, *(sampling.stop_token_ids if sampling is not None else ())))
        self.arrived_at = self.spec.arrived_at

    @classmethod
    def of(cls, spec: RequestSpec) -> Iterator[Request]:
        """The sequences of a specification, each prompt's first one before its siblings, which follow it."""
        leader: Request | None = None
        for index, id in enumerate(spec.ids):
            request = cls(spec, index, id)
            if leader is None or index % spec.n == 0:
                leader = request
            else:
                request.leader, request.state = leader, State.HELD
                leader.followers.append(request)
            yield request

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
