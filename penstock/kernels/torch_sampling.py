"""Sampling and log-probabilities by torch's operators: argmax, or the inverse of a cumulative sum.

    logits [n, V] ─┬─ greedy           argmax
                   ├─ open             temperature, min_p: no order needed
                   └─ cut              top_k, top_p: the most probable tokens in order

What a row gets depends on that row and its number alone. Where order matters it is (logit descending, id
ascending): torch.topk leaves equal logits in any order, and with bfloat16 models they are common. One promise
of the seam is kept only so far: of more than 32 equal logits at the end of a list of alternatives, any may
be missing.

Each way of choosing returns (tokens [n] int64, check [n] float32). A row whose check is not finite (NaN,
infinite or only -inf logits) has no distribution, and its token is meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .operations import Draw, Likelihood
from .transfer import on_device

_BLOCK = 512  # tokens whose weights are summed first: the cumulative sum then runs over V / 512 numbers
_CANDIDATES = 256  # tokens looked at before the whole row is
_TILE = 1 << 23  # logits worked on at once on a CPU: bounds the memory, 32 MiB for each copy
_MARGIN = 32  # more candidates than asked for, so that equals at the border are ordered by id

_Choice = tuple[Tensor, Tensor]


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """See Operations.sample. Each kind of row in one go."""
    tokens, checks = choose(logits, draws)
    chosen, values = torch.stack([tokens.double(), checks.double()]).tolist()  # one copy from the device
    return [int(token) for token in chosen], values


def choose(logits: Tensor, draws: Sequence[Draw]) -> _Choice:
    """See Operations.choose. Each kind of row in one go."""
    logits = logits.float()
    groups: dict[Callable[[Tensor, Sequence[Draw]], _Choice], list[int]] = {}
    for i, draw in enumerate(draws):
        if draw.temperature == 0:
            kind: Callable[[Tensor, Sequence[Draw]], _Choice] = _choose_greedy
        else:
            kind = choose_cut if draw.top_k > 0 or draw.top_p < 1.0 else choose_open
        groups.setdefault(kind, []).append(i)
    if len(groups) == 1:
        ((only, _),) = groups.items()
        return only(logits, draws)
    tokens = torch.zeros(len(draws), dtype=torch.int64, device=logits.device)
    checks = torch.zeros(len(draws), dtype=torch.float32, device=logits.device)
    for kind, indices in groups.items():
        where = on_device(torch.tensor(indices), logits.device)
        tokens[where], checks[where] = kind(logits[where], [draws[i] for i in indices])
    return tokens, checks


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Likelihood]:
    """See Operations.logprobs. A few rows at a time."""
    found: list[Likelihood] = []
    for start, stop in tiles(logits):
        found += _likelihoods(logits[start:stop], tokens[start:stop], counts[start:stop])
    return found


def _likelihoods(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Likelihood]:
    vocabulary = logits.shape[1]
    logprobs = logits.float().log_softmax(-1)
    own = on_device(torch.tensor(tokens), logits.device)[:, None]
    ranks = (logits >= logits.gather(1, own)).sum(1).tolist()
    values = logprobs.gather(1, own)[:, 0].tolist()
    best: list[tuple[list[int], list[float]]] = [([], [])] * len(tokens)
    for width in {candidates(count, vocabulary) for count in counts if count}:
        at = [i for i, count in enumerate(counts) if count and candidates(count, vocabulary) == width]
        ids = ranked(logits[at], width)[1][:, : max(counts[i] for i in at)]
        best_values = logprobs[at].gather(1, ids).tolist()
        for i, row_ids, row_values in zip(at, ids.tolist(), best_values, strict=True):
            best[i] = row_ids[: counts[i]], row_values[: counts[i]]
    return [Likelihood(value, rank, *others) for value, rank, others in zip(values, ranks, best, strict=True)]


def candidates(count: int, vocabulary: int) -> int:
    """Candidates to look at for so many alternatives: a function of the row alone, not of its batch."""
    return vocabulary if 8 * count > vocabulary else min(vocabulary, count + _MARGIN)


def _choose_greedy(logits: Tensor, draws: Sequence[Draw]) -> _Choice:
    """The most probable token, the lowest id among equals."""
    tokens = logits.argmax(-1)
    return tokens, logits.gather(1, tokens[:, None])[:, 0]


def choose_open(logits: Tensor, draws: Sequence[Draw]) -> _Choice:
    """Sample rows that have neither top_k nor top_p."""
    parts = [_open_tile(logits[start:stop], draws[start:stop]) for start, stop in tiles(logits)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([check for _, check in parts])


def choose_cut(logits: Tensor, draws: Sequence[Draw]) -> _Choice:
    """Sample rows that have top_k or top_p.

    Looks at the best 256 tokens of each row, and at all of them where that does not settle it: where the last
    token that is kept is not strictly more probable than the last one looked at.
    """
    vocabulary = logits.shape[1]
    if vocabulary <= _CANDIDATES:
        return _choose_from_all(logits, draws)
    values, ids = ranked(logits, _CANDIDATES)
    place, certain = _cut(logits, values, draws)
    tokens = ids.gather(1, place)[:, 0]
    rest = [i for i, sure in enumerate(certain.tolist()) if not sure]
    if rest:
        where = on_device(torch.tensor(rest), logits.device)
        tokens[where] = _choose_from_all(logits[where], [draws[i] for i in rest])[0]
    return tokens, values[:, 0]


def _choose_from_all(logits: Tensor, draws: Sequence[Draw]) -> _Choice:
    """The same from whole rows, sorted."""
    parts = []
    for start, stop in tiles(logits):
        values, ids = ranked(logits[start:stop], logits.shape[1])
        place, _ = _cut(logits[start:stop], values, draws[start:stop])
        parts.append((ids.gather(1, place)[:, 0], values[:, 0]))
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([check for _, check in parts])


def ranked(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row and their indices: value descending, then index ascending.

    Of several values equal to the smallest one returned, any may be missing.
    """
    if width >= values.shape[1]:
        ordered, ids = values.sort(dim=1, descending=True, stable=True)
        return ordered, ids
    ids = values.topk(width, dim=1, sorted=False).indices.sort(dim=1).values
    ordered, order = values.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ordered, ids.gather(1, order)


def tiles(logits: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of the groups of rows to work on at once; all of them on a device."""
    rows, width = logits.shape
    step = max(1, _TILE // width) if logits.device.type == "cpu" else rows
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _open_tile(logits: Tensor, draws: Sequence[Draw]) -> _Choice:
    vocabulary = logits.shape[1]
    weights = _probabilities(logits, draws)
    whole = vocabulary // _BLOCK * _BLOCK
    sums = weights[:, :whole].reshape(len(weights), -1, _BLOCK).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    cumulative = sums.double().cumsum(1)
    target = cumulative[:, -1:] * _column(cumulative, [draw.uniform for draw in draws])
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inner = weights.gather(1, ids.clamp(max=vocabulary - 1)).double()
    inner = inner.masked_fill_(ids >= vocabulary, 0.0).cumsum(1)
    # the two sums of a block differ by rounding: never step past its last token with any weight
    last = torch.searchsorted(inner, inner[:, -1:].contiguous())
    place = torch.minimum(_first_above(inner, target - before), last)
    tokens = (block * _BLOCK + place)[:, 0].clamp(max=vocabulary - 1)
    return tokens, cumulative[:, -1].float()


def _probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Softmax at each row's temperature, with 0 below min_p (and not normalised again) [n, V]."""
    # few passes over memory matter more here than few operations
    probabilities = (logits / _column(logits, [draw.temperature for draw in draws])).softmax(-1)
    if any(draw.min_p > 0 for draw in draws):
        least = probabilities.amax(-1, keepdim=True) * _column(logits, [draw.min_p for draw in draws])
        probabilities.masked_fill_(probabilities < least, 0.0)
    return probabilities


def _cut(logits: Tensor, values: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Choose among the largest values of each row: (place [n, 1], whether it is certain [n]).

    Args:
        logits: [n, V], for the mass of the rest where it matters.
        values: [n, C] the C largest, descending.
        draws: n of them.
    """
    width, complete = values.shape[1], values.shape[1] == logits.shape[1]
    peaks, last = values[:, :1], values[:, -1:]
    weights = ((values - peaks) / _column(values, [draw.temperature for draw in draws])).exp_()
    keep = weights > 0
    exhausted = last == -float("inf")  # then the candidates are all that is possible
    settled = torch.ones_like(exhausted)
    if any(draw.top_k for draw in draws):
        kth = torch.tensor([min(draw.top_k or width, width) - 1 for draw in draws])
        least = values.gather(1, on_device(kth, values.device)[:, None])
        keep &= values >= least
        without = torch.tensor([draw.top_k <= 0 for draw in draws])
        settled = exhausted | on_device(without, values.device)[:, None] | (least > last) | ~peaks.isfinite()
    if any(draw.min_p > 0 for draw in draws):
        keep &= weights >= _column(weights, [draw.min_p for draw in draws])
    weights = weights.masked_fill_(~keep, 0.0).double()
    cumulative = weights.cumsum(1)
    if any(draw.top_p < 1 for draw in draws):
        total = cumulative[:, -1:].clone()
        # without top_k the candidates are only a part of the mass, unless min_p ended it among them
        partial = [
            i
            for i, open_end in enumerate(keep[:, -1].tolist())
            if open_end and not complete and draws[i].top_p < 1 and not draws[i].top_k
        ]
        if partial:
            where = on_device(torch.tensor(partial), values.device)
            part = logits if len(partial) == len(logits) else logits[where]
            probabilities = _probabilities(part, [draws[i] for i in partial])
            mass = probabilities.sum(-1, keepdim=True) / probabilities.amax(-1, keepdim=True)
            total[where] = mass.double()
        top_p = _column(weights, [draw.top_p if draw.top_p < 1 else float("inf") for draw in draws])
        keep &= cumulative - weights < top_p * total
    end = (keep.sum(1, keepdim=True) - 1).clamp(min=0)  # those kept are the first ones
    settled &= (values.gather(1, end) > last) | exhausted | ~peaks.isfinite()
    target = cumulative.gather(1, end) * _column(cumulative, [draw.uniform for draw in draws])
    place = torch.minimum(_first_above(cumulative, target), end)
    return place, settled[:, 0] | complete


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [n, 1] of the first element that exceeds the target; the last index if none does."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return on_device(torch.tensor(values, dtype=like.dtype), like.device)[:, None]
