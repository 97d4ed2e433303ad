"""The budget of a thought: which token ends it, where it has become too long.

    prompt … <think> t t t t t </think> answer …
                    └ budget ┘└ forced from here on, unless it has ended before

vLLM's `thinking_token_budget`, for one thought: what stands behind its end is the answer, whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.sampling_params import ThoughtLimit


class Thought:
    """Follows one sequence's tokens; nothing in it is lost when it is made anew of the same ones."""

    __slots__ = ("_counted", "_limit", "_prompt_len", "_stop", "ended")

    def __init__(self, limit: ThoughtLimit, prompt: Sequence[int]) -> None:
        self._limit = limit
        self._prompt_len = self._counted = len(prompt)
        self._stop: int | None = None
        """Where the end is forced, if the thought goes on until there; None while it has not begun."""
        self.ended = False
        """It ended by itself, within its budget."""
        last = {token: at for at, token in enumerate(prompt) if token in (limit.start, limit.end)}
        begins = last.get(limit.start, -1) if limit.start is not None else -1
        if begins > last.get(limit.end, -1):
            self._begin(begins + 1)
        elif limit.begun:
            self._begin(len(prompt))

    def _begin(self, at: int) -> None:
        self._stop = max(at + self._limit.tokens, self._prompt_len)

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in what is new."""
        limit = self._limit
        for at in range(self._counted, len(tokens)):
            if self._settled(at):
                break
            token = tokens[at]
            if token == limit.start and (self._stop is None or (limit.begun and at == self._prompt_len)):
                self._begin(at + 1)
            elif token == limit.end and self._stop is not None:
                self.ended = True
        self._counted = len(tokens)

    def _settled(self, at: int) -> bool:
        """Whether no token from this place on changes anything."""
        return self.ended or (self._stop is not None and at >= self._stop)

    def forced(self, at: int) -> int | None:
        """The token that has to stand at this place, which is the next one."""
        if self.ended or self._stop is None:
            return None
        place = at - self._stop
        return self._limit.forced[place] if 0 <= place < len(self._limit.forced) else None

    def waits(self, at: int) -> bool:
        """Whether the tokens before this place have to be known to say what has to stand there."""
        return not self.ended and (self._stop is None or self.forced(at) is not None)
