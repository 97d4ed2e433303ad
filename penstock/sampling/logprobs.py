"""Log-probabilities as `--logprobs-mode raw_logprobs` means them: of the model's own distribution.

    logits [n, V] ──▶ log_softmax ──▶ the token's, its rank, and the most probable ones

They are taken before penalties, bias and temperature. A rank counts the tokens that are at least as probable,
as in vLLM; among equals the lower id stands first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.plan import TokenLogprob
from penstock.kernels.cpu.sampling import kernels

from .choose import ranked, tiles

_MARGIN = 32  # more candidates than asked for, so that equals at the border are ordered by id


def gather_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Logprobs of `tokens` and of the most probable alternatives, a few rows at a time.

    Args:
        logits: [n, V]; not changed.
        tokens: the token at each position, n of them.
        counts: alternatives wanted at each position; -1 means the whole vocabulary.
    """
    fast = _fast(logits, tokens, counts)
    if fast is not None:
        return fast
    found: list[TokenLogprob] = []
    for start, stop in tiles(logits):
        found += _tile(logits[start:stop], tokens[start:stop], counts[start:stop])
    return tuple(found)


def prompt_logprobs(logits: Tensor, targets: Sequence[int], count: int) -> tuple[TokenLogprob, ...]:
    """Logprobs of the prompt tokens `targets`, of which each is predicted by its row of `logits` [n, V].

    Works in tiles: beside the logits it needs a few rows' memory. `count` alternatives, -1 for all.
    """
    return gather_logprobs(logits, targets, [count] * len(targets))


def _fast(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
    """The same by the kernels; None where there are none, or where they would sort much of the vocabulary."""
    kernel = kernels(logits)
    if kernel is None or any(count < 0 or 8 * count > logits.shape[1] for count in counts):
        return None
    rows = kernel.logprobs(logits, tokens, counts)
    if rows is None:
        return None
    return tuple(
        TokenLogprob(token=token, logprob=value, rank=rank, top=tuple(zip(best, values, strict=True)))
        for token, (value, rank, best, values) in zip(tokens, rows, strict=True)
    )


def _tile(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    vocabulary = logits.shape[1]
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs >= own).sum(1).tolist()
    values = own[:, 0].tolist()
    wanted = [vocabulary if count < 0 else min(count, vocabulary) for count in counts]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    for width in {_width(count, vocabulary) for count in wanted if count}:
        at = [i for i, count in enumerate(wanted) if count and _width(count, vocabulary) == width]
        best, ids = ranked(logprobs[at], width)
        most = max(wanted[i] for i in at)
        listed = zip(at, ids[:, :most].tolist(), best[:, :most].tolist(), strict=True)
        for i, token_ids, token_values in listed:
            tops[i] = tuple(zip(token_ids[: wanted[i]], token_values[: wanted[i]], strict=True))
    return [
        TokenLogprob(token=token, logprob=value, rank=rank, top=top)
        for token, value, rank, top in zip(tokens, values, ranks, tops, strict=True)
    ]


def _width(count: int, vocabulary: int) -> int:
    """Candidates to look at for so many alternatives: a function of the row alone, not of its batch."""
    return vocabulary if 8 * count > vocabulary else min(vocabulary, count + _MARGIN)
