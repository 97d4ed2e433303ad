"""Log-probabilities as `--logprobs-mode raw_logprobs` means them: of the model's own distribution.

    logits [n, V] ──▶ log_softmax ──▶ the token's, its rank, and the most probable ones, or those of tokens
                                      that are named

They are taken before penalties, bias and temperature. A rank counts the tokens that are at least as probable,
as in vLLM; among equals the lower id stands first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.plan import TokenLogprob
from penstock.kernels.operations import Operations


def gather_logprobs(
    operations: Operations,
    logits: Tensor,
    tokens: Sequence[int],
    counts: Sequence[int],
    named: Sequence[Sequence[int] | None] = (),
) -> tuple[TokenLogprob, ...]:
    """Logprobs of `tokens` and of the most probable alternatives.

    Args:
        logits: [n, V]; not changed.
        tokens: the token at each position, n of them.
        counts: alternatives wanted at each position; -1 means the whole vocabulary.
        named: token ids whose logprobs are wanted instead at each position, None where they are not; the
            position's own token stands before them. Empty: nowhere.
    """
    vocabulary = logits.shape[1]
    named = named or [None] * len(tokens)
    wanted = [
        0 if ids else vocabulary if count < 0 else min(count, vocabulary)
        for count, ids in zip(counts, named, strict=True)
    ]
    entries: list[TokenLogprob] = []
    for i, found in enumerate(operations.logprobs(logits, tokens, wanted)):
        ids, token = named[i], tokens[i]
        if ids:
            best = _of(logits[i], ids, token, found.logprob)
        else:
            best = tuple(zip(found.best, found.logprobs, strict=True))
        entries.append(TokenLogprob(token, found.logprob, found.rank, best))
    return tuple(entries)


def _of(row: Tensor, ids: Sequence[int], token: int, logprob: float) -> tuple[tuple[int, float], ...]:
    """Logprobs of `token`, which is known, and of `ids` in a row [V]: a difference of logits is one of
    logprobs, so that the vocabulary is not summed up again."""
    others = [id for id in ids if id != token]
    if not math.isfinite(logprob):
        values: list[float] = row.float().log_softmax(-1)[others].tolist()
    else:
        logits = row[torch.tensor([token, *others], device=row.device)].double()
        values = (logits[1:] - logits[0] + logprob).tolist()
    return ((token, logprob), *zip(others, values, strict=True))


def prompt_logprobs(
    operations: Operations, logits: Tensor, targets: Sequence[int], count: int
) -> tuple[TokenLogprob, ...]:
    """Logprobs of the prompt tokens `targets`, of which each is predicted by its row of `logits` [n, V].

    `count` alternatives, -1 for all.
    """
    return gather_logprobs(operations, logits, targets, [count] * len(targets))
