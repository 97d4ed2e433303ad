"""What the sampler must know of one running request: parameters, tokens so far, and a seed.

An executor keeps one Row per admitted request and appends every sampled token to `tokens`; nothing else is
carried from step to step, so a request that was preempted goes on exactly as it would have.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from penstock.core.sampling_params import SamplingParams


class Seen:
    """The distinct tokens of a row and how often each was generated; follows `tokens` as it grows."""

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
class Row:
    """One request as the sampler sees it."""

    request: str
    params: SamplingParams
    prompt_len: int
    """Leading `tokens` that belong to the prompt."""
    tokens: list[int]
    """Prompt and generated token ids; only ever appended to, by the executor."""
    eos_ids: tuple[int, ...] = ()
    """End-of-sequence ids, which min_tokens holds back together with stop_token_ids."""
    seed: int = 0
    """`params.seed`, or a random one that the executor drew for this request."""
    seen: Seen = field(default_factory=Seen, init=False, repr=False)

    @property
    def generated(self) -> int:
        """Number of tokens generated so far; also the counter of the random numbers."""
        return len(self.tokens) - self.prompt_len

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
    def holds_back_stop(self) -> bool:
        """Whether min_tokens still forbids the tokens that would end the output."""
        return self.generated < self.params.min_tokens

    @property
    def edited(self) -> bool:
        """Whether this row's logits are changed before sampling (temperature and cuts aside)."""
        params = self.params
        return (
            bool(params.logit_bias)
            or params.allowed_token_ids is not None
            or self.holds_back_stop
            or self.penalised
        )
