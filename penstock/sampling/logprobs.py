"""Log-probabilities as `--logprobs-mode raw_logprobs` means them: of the model's own distribution.

    logits [n, V] ──▶ log_softmax ──▶ the token's, its rank, and the most probable ones

They are taken before penalties, bias and temperature. A rank counts the tokens that are at least as probable,
as in vLLM; among equals the lower id stands first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from penstock.core.plan import TokenLogprob
from penstock.kernels.operations import Operations


def gather_logprobs(
    operations: Operations, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> tuple[TokenLogprob, ...]:
    """Logprobs of `tokens` and of the most probable alternatives.

    Args:
        logits: [n, V]; not changed.
        tokens: the token at each position, n of them.
        counts: alternatives wanted at each position; -1 means the whole vocabulary.
    """
    vocabulary = logits.shape[1]
    wanted = [vocabulary if count < 0 else min(count, vocabulary) for count in counts]
    return tuple(
        TokenLogprob(token, found.logprob, found.rank, tuple(zip(found.best, found.logprobs, strict=True)))
        for token, found in zip(tokens, operations.logprobs(logits, tokens, wanted), strict=True)
    )


def prompt_logprobs(
    operations: Operations, logits: Tensor, targets: Sequence[int], count: int
) -> tuple[TokenLogprob, ...]:
    """Logprobs of the prompt tokens `targets`, of which each is predicted by its row of `logits` [n, V].

    `count` alternatives, -1 for all.
    """
    return gather_logprobs(operations, logits, targets, [count] * len(targets))
