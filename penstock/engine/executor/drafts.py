"""Drafts of tokens: one is verified by sampling its position as if it were right. What comes out is what
would have come out without it, with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.plan import Failure, Outcome, TokenLogprob
from penstock.sampling.sampler import Sampled
from penstock.sampling.state import SamplingState


def verified(drafts: tuple[int, ...], choices: Sequence[Sampled]) -> tuple[Outcome, int]:
    """(tokens up to the first draft that was wrong, or the failure that was met before; its place)."""
    if not drafts and (only := choices[0]).error is None:
        return Outcome((only.token,), () if only.logprob is None else (only.logprob,)), 0
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    for place, choice in enumerate(choices):
        if choice.error is not None:
            return Outcome(failure=Failure(choice.error)), place
        tokens.append(choice.token)
        if choice.logprob is not None:
            logprobs.append(choice.logprob)
        if place < len(drafts) and drafts[place] != choice.token:
            break
    return Outcome(tuple(tokens), tuple(logprobs)), 0


def ahead(state: SamplingState, drafts: tuple[int, ...]) -> SamplingState:
    """The state as it will be if these drafts are right."""
    return SamplingState(
        request=state.request,
        params=state.params,
        prompt_len=state.prompt_len,
        tokens=[*state.tokens, *drafts],
        eos_ids=state.eos_ids,
        seed=state.seed,
        grammar=None if state.grammar is None else state.grammar.copy(),
        sharing=state,
    )
