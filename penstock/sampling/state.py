"""What the sampler must know of one running request: parameters, tokens so far, and a seed.

An executor keeps one SamplingState per admitted request and appends every sampled token to `tokens`; nothing
else is carried from step to step, so a request that was preempted goes on exactly as it would have.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from penstock.core.sampling_params import Sampling
from penstock.grammar.compiler import Matcher
from penstock.kernels.operations import Draw
from penstock.kernels.transfer import on_device

from .random import uniform
from .thought import Thought


class Edits:
    """The tokens that a request names, as tensors: made once, at first use, where its logits are.

    Attributes:
        allowed: int64 [A], the only tokens it may generate; None allows all.
        forbidden: int64 [F], what min_tokens holds back.
        biased, biases: int64 [B] and float32 [B], what is added to which logits.
    """

    __slots__ = ("_eos_ids", "_excluded", "_made", "_params", "allowed", "biased", "biases", "forbidden")

    allowed: Tensor | None
    forbidden: Tensor
    biased: Tensor
    biases: Tensor

    def __init__(self, params: Sampling, eos_ids: tuple[int, ...]) -> None:
        self._params = params
        self._eos_ids = eos_ids
        self._made = False
        self._excluded: Tensor | None = None
        """bool [V]; for a long allow-list, which would be a slow index."""

    def on(self, device: torch.device) -> Edits:
        """These, with tensors on `device`, which is the same at every call."""
        if not self._made:
            params = self._params
            stops = sorted({*self._eos_ids, *params.stop_token_ids})
            allowed = params.allowed_token_ids
            biased, biases = list(params.logit_bias), list(params.logit_bias.values())
            self.allowed = None if allowed is None else on_device(torch.tensor(allowed), device)
            self.forbidden = on_device(torch.tensor(stops, dtype=torch.int64), device)
            self.biased = on_device(torch.tensor(biased, dtype=torch.int64), device)
            self.biases = on_device(torch.tensor(biases, dtype=torch.float32), device)
            self._made = True
        return self

    def allow_only(self, logits: Tensor) -> None:
        """Set all others than the allowed tokens of a row [V] to -inf, in place; `on` comes first."""
        allowed = self.allowed
        if allowed is None:
            return
        if len(allowed) * _LONG_ALLOWED < len(logits):
            kept = logits[allowed]
            logits.fill_(-math.inf)
            logits[allowed] = kept
            return
        if self._excluded is None:
            self._excluded = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            self._excluded[allowed] = False
        logits.masked_fill_(self._excluded, -math.inf)


class Seen:
    """The distinct tokens of a request and how often each was generated; follows `tokens` as it grows."""

    __slots__ = ("_slots", "counted", "counts", "ids")

    def __init__(self) -> None:
        self.ids = array("q")
        """Distinct token ids of prompt and output, in order of appearance."""
        self.counts = array("f")
        """How often each of `ids` was generated (0 for tokens of the prompt only)."""
        self.counted = 0
        """Tokens taken into account."""
        self._slots: dict[int, int] = {}

    def follow(self, tokens: list[int], prompt_len: int) -> None:
        """Count the tokens that are new since the last call."""
        slots = self._slots
        for position in range(self.counted, len(tokens)):
            token = tokens[position]
            slot = slots.get(token)
            if slot is None:
                slot = slots[token] = len(self.ids)
                self.ids.append(token)
                self.counts.append(0.0)
            if position >= prompt_len:
                self.counts[slot] += 1.0
        self.counted = len(tokens)


@dataclass(slots=True, eq=False)
class SamplingState:
    """One request as the sampler sees it."""

    request: str
    params: Sampling
    prompt_len: int
    """Leading `tokens` that belong to the prompt."""
    tokens: list[int]
    """Prompt and generated token ids; only ever appended to, by the executor."""
    eos_ids: tuple[int, ...] = ()
    """End-of-sequence ids, which min_tokens holds back together with stop_token_ids, also with ignore_eos, as
    in vLLM."""
    seed: int = 0
    """`params.seed`, or a random one that the executor drew for this request."""
    pending: int = 0
    """Tokens that were sampled after `tokens`, and whose ids only the device knows yet."""
    grammar: Matcher | None = None
    """What the output must match; it follows `tokens`."""
    sharing: InitVar[SamplingState | None] = None
    """Another state with the same parameters and eos_ids, whose tensors serve this one too."""
    edits: Edits = field(init=False, repr=False)
    seen: Seen = field(default_factory=Seen, init=False, repr=False)
    thought: Thought | None = field(default=None, init=False, repr=False)
    """How much of its budget is used up, where it has one."""

    def __post_init__(self, sharing: SamplingState | None) -> None:
        if self.params.thought is not None:
            self.thought = Thought(self.params.thought, self.tokens[: self.prompt_len])
        self.edits = Edits(self.params, self.eos_ids) if sharing is None else sharing.edits

    @property
    def generated(self) -> int:
        """Number of tokens generated so far; also the counter of the random numbers."""
        return len(self.tokens) + self.pending - self.prompt_len

    @property
    def draw(self) -> Draw:
        """How the next token is drawn."""
        params = self.params
        if params.greedy:
            return _GREEDY
        return Draw(
            uniform(self.seed, self.generated),
            params.temperature,
            params.min_p,
            max(0, params.top_k),
            params.top_p,
        )

    @property
    def penalised(self) -> bool:
        """Whether any penalty applies."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

    @property
    def waits(self) -> bool:
        """Whether its next token cannot be sampled, or told, before the host has seen the ids of those before
        it: the rest is a function of how many there are."""
        params = self.params
        followed = any(len(ids) > 1 for ids in params.bad_words_ids)
        if self.penalised or params.logprobs is not None or self.grammar is not None or followed:
            return True
        if self.thought is None:
            return False
        self.thought.follow(self.tokens)
        return self.thought.waits(len(self.tokens) + self.pending)

    @property
    def forced(self) -> int | None:
        """The only token that may come next: one that ends a thought which has used up its budget."""
        if self.thought is None:
            return None
        self.thought.follow(self.tokens)
        return self.thought.forced(len(self.tokens))

    @property
    def holds_back_stop(self) -> bool:
        """Whether min_tokens still forbids the tokens that would end the output."""
        return self.generated < self.params.min_tokens

    @property
    def bad(self) -> tuple[int, ...]:
        """Token ids that would complete one of its bad words now."""
        output = self.generated
        found = []
        for *before, last in self.params.bad_words_ids:
            count = len(before)
            if count <= output and (not count or self.tokens[-count:] == before):
                found.append(last)
        return tuple(dict.fromkeys(found))

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that would end the output, as min_tokens sees them."""
        return (*self.eos_ids, *self.params.stop_token_ids)

    @property
    def edited(self) -> bool:
        """Whether the logits are changed before sampling (temperature and cuts aside)."""
        params = self.params
        return (
            bool(params.logit_bias)
            or params.allowed_token_ids is not None
            or self.holds_back_stop
            or self.penalised
            or bool(params.bad_words_ids)
        )


_LONG_ALLOWED = 16
"""An allow-list of more than this part of the vocabulary is a mask: 200,000 ids as an index take as long as a
small model's whole step, for each row."""

_GREEDY = Draw(uniform=0.0, temperature=0.0)
