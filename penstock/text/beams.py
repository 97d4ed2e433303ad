"""Beam search, as vLLM has it: the most probable continuations of a prompt, found token by token.

    BeamSearch.asks ─▶ token ids of each beam ─▶ (the engine: one token, with 2 × width logprobs) ─▶ take
                                                  … until `done` ─▶ best()

Each step, of all beams with each of their most probable next tokens, the `width` with the greatest sum of
logprobs go on; those that an end-of-sequence token ends are kept aside. The best are chosen by that sum over
length^penalty, where the length is that of prompt and output (vLLM's; a prompt's tokens are in it).

It knows token ids and logprobs; no engine, no text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from penstock.core.plan import TokenLogprob


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation."""

    tokens: tuple[int, ...] = ()
    """Generated ones; the one that ended it only where that is included."""
    logprob: float = 0.0
    """Sum over all generated tokens, the one that ended it included."""
    stop_reason: int | None = None
    """The token that ended it; None if there was no room for more."""


class BeamSearch:
    """The search for one prompt."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        eos_ids: Collection[int] = (),
        include_stop: bool = False,
    ) -> None:
        """Args:
        width: beams that go on, and continuations in the end.
        max_tokens: of a continuation.
        eos_ids: tokens that end one; none to ignore them.
        include_stop: whether the ending token is one of its tokens.
        """
        self.prompt = tuple(prompt)
        self._width = width
        self._left = max_tokens
        self._penalty = length_penalty
        self._eos_ids = frozenset(eos_ids)
        self._include_stop = include_stop
        self._beams = [Beam()]
        self._ended: list[Beam] = []

    @property
    def done(self) -> bool:
        """Whether nothing can be added."""
        return self._left == 0 or not self._beams

    @property
    def asks(self) -> list[tuple[int, ...]]:
        """What the model has to go on with: prompt and tokens of each beam."""
        return [self.prompt + beam.tokens for beam in self._beams]

    def take(self, positions: Sequence[TokenLogprob]) -> None:
        """The most probable next tokens of each of `asks`, in their order."""
        going: list[Beam] = []
        for beam, position in zip(self._beams, positions, strict=True):
            for token, logprob in position.top:
                total = beam.logprob + logprob
                if token in self._eos_ids:
                    kept = (*beam.tokens, token) if self._include_stop else beam.tokens
                    self._ended.append(Beam(kept, total, token))
                else:
                    going.append(Beam((*beam.tokens, token), total))
        going.sort(key=lambda beam: -beam.logprob)  # stable: ties go by beam, then by rank
        self._beams = going[: self._width]
        self._left -= 1

    def best(self) -> list[Beam]:
        """The best continuations, at most `width`, the best first."""
        return sorted([*self._ended, *self._beams], key=self._score, reverse=True)[: self._width]

    def _score(self, beam: Beam) -> float:
        length = len(self.prompt) + len(beam.tokens)
        if self._include_stop and beam.stop_reason is not None:
            length -= 1
        return float(beam.logprob / max(length, 1) ** self._penalty)
