"""What a client asked for, once and frozen.

    RequestSpec   prompts once, parameters once, n. Travels whole, from whoever encodes it to the executor;
                  nobody copies it field by field. Its sequences (prompts × n) are made by `Request.of`.

It knows what can be asked, not what becomes of it. Fields that not every engine can serve say so in `needs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import InvalidRequest
from .pooling import Pooling as Pooling
from .sampling_params import Sampling
from .structured import Grammar


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
    generated: tuple[int, ...] = ()
    """What another engine had generated when it was lost: the sequence goes on behind it, as after a
    preemption. They count as generated wherever that matters: max_tokens, penalties, the random numbers."""
    second: int | None = None
    """Of an encoder's pair of texts: where the second one begins, from where on the token type is 1."""


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
    grammar: Grammar | None = None
    """What the output must match. Whoever samples compiles it; its text is here, so that it travels whole."""
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
        if not self.id:
            raise InvalidRequest("a request needs an id.", param="request_id")
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
            if prompt.generated:
                self._check_resumed(prompt)
            if (prompt.max_tokens > 0) == (self.sampling is None):
                raise InvalidRequest(
                    f"max_tokens is {prompt.max_tokens}: a request that samples needs 1 or more, "
                    "one that pools 0.",
                    param="max_tokens",
                )

    def _check_resumed(self, prompt: Prompt) -> None:
        if self.sampling is None or self.n > 1:
            raise InvalidRequest("only a request that samples one sequence can be resumed.", param="n")
        if self.sampling.prompt_logprobs is not None:
            raise InvalidRequest("a resumed request gives no prompt_logprobs.", param="prompt_logprobs")
        if len(prompt.generated) >= prompt.max_tokens:
            raise InvalidRequest(
                f"{len(prompt.generated)} tokens were generated, of at most {prompt.max_tokens}: "
                "nothing is left to do.",
                param="max_tokens",
            )


def _in_64_bits(seed: int) -> int:
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return 0 if wrapped == -1 else wrapped  # -1 would mean no seed
