"""One step's sampling: logits of the rows that want a token in, one token each out.

    logits [R, V] ─▶ raw copies where logprobs are wanted ─▶ edits ─▶ choose ─▶ tokens ─▶ logprobs

It knows rows. It knows no scheduler, no model and keeps nothing between steps. A row of broken logits fails
alone, with its cause.

Torch's operators in `choose` and `logprobs` are the specification. On a CPU with compiled kernels they do the
same work in a few passes over the logits, in whichever of float32 and bfloat16 the model gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.plan import TokenLogprob
from penstock.kernels.cpu.sampling import Sampling, kernels

from .choose import Draw, choose_cut, choose_greedy, choose_open
from .logits import edit
from .logprobs import gather_logprobs
from .random import uniform
from .rows import Row


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one row got."""

    token: int
    """-1 when there is an error."""
    logprob: TokenLogprob | None = None
    """Where the request asks for logprobs."""
    error: str | None = None
    """Why this row could not be sampled."""


class Sampler:
    """Samples rows in a batch; the result of a row does not depend on the others."""

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
        """One token for each row.

        Args:
            logits: [R, V], of any floating type; float32 ones are edited in place, so not to be used
                afterwards.
            rows: R rows, in the same order; their `tokens` do not contain the new token yet.

        Raises:
            ValueError: the shapes do not fit.
        """
        if logits.ndim != 2 or logits.shape[0] != len(rows):
            raise ValueError(f"need logits of shape [{len(rows)}, V], got {list(logits.shape)}.")
        if not rows:
            return []
        asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        editing = [i for i, row in enumerate(rows) if row.edited]
        raw = _raw(logits, asking, editing)
        fast = kernels(logits)
        if editing or fast is None:
            logits = logits.float()
        if editing:
            edit(logits, rows, editing)
        tokens, fine = _choose(logits, rows) if fast is None else _choose_fast(fast, logits, rows)
        broken = {i: _cause(logits[i], rows[i]) for i, ok in enumerate(fine) if not ok}
        asking_at = {i: at for at, i in enumerate(asking) if i not in broken}
        logprobs: dict[int, TokenLogprob] = {}
        if raw is not None and asking_at:
            chosen = raw if len(asking_at) == len(asking) else raw[list(asking_at.values())]
            counts = [rows[i].params.logprobs or 0 for i in asking_at]
            gathered = gather_logprobs(chosen, [tokens[i] for i in asking_at], counts)
            logprobs = dict(zip(asking_at, gathered, strict=True))
        return [
            Sampled(-1, error=broken[i]) if i in broken else Sampled(token, logprobs.get(i))
            for i, token in enumerate(tokens)
        ]


def _raw(logits: Tensor, asking: Sequence[int], editing: Sequence[int]) -> Tensor | None:
    """The logits of the rows that ask for logprobs, safe from the edits; None if there are none."""
    if not asking:
        return None
    if len(asking) == len(logits) and (not editing or logits.dtype != torch.float32):
        return logits
    return logits[list(asking)]  # a copy


def _choose(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[bool]]:
    """(token, whether the row has a distribution) of each row, each kind of row in one go."""
    groups: dict[Callable[..., tuple[Tensor, Tensor]], list[int]] = {}
    for i, row in enumerate(rows):
        params = row.params
        if params.greedy:
            kind: Callable[..., tuple[Tensor, Tensor]] = choose_greedy
        else:
            kind = choose_cut if params.top_k > 0 or params.top_p < 1.0 else choose_open
        groups.setdefault(kind, []).append(i)
    tokens, fine = [0] * len(rows), [True] * len(rows)
    for kind, indices in groups.items():
        part = logits if len(indices) == len(rows) else logits[indices]
        arguments = () if kind is choose_greedy else ([_draw(rows[i]) for i in indices],)
        chosen, check = kind(part, *arguments)
        finite = check.isfinite()
        pairs = torch.stack([chosen, finite.to(chosen.dtype)]).tolist()  # one copy from the device
        for i, token, ok in zip(indices, *pairs, strict=True):
            tokens[i], fine[i] = token, bool(ok)
    return tokens, fine


def _choose_fast(kernel: Sampling, logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[bool]]:
    """The same by the kernels, all kinds of rows in one go."""
    params = [row.params for row in rows]
    tokens, checks = kernel.sample(
        logits,
        temperatures=[0.0 if each.greedy else each.temperature for each in params],
        uniforms=[0.0 if row.params.greedy else uniform(row.seed, row.generated) for row in rows],
        min_ps=[each.min_p for each in params],
        top_ks=[min(max(0, each.top_k), logits.shape[1]) for each in params],
        top_ps=[each.top_p for each in params],
    )
    return tokens, [math.isfinite(check) for check in checks]


def _draw(row: Row) -> Draw:
    params = row.params
    return Draw(
        uniform=uniform(row.seed, row.generated),
        temperature=params.temperature,
        min_p=params.min_p,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
    )


def _cause(logits: Tensor, row: Row) -> str:
    """Why a row [V] has no distribution."""
    if bool(logits.isnan().any()):
        return (
            "logits contain NaN: the model's numbers overflowed or its weights are damaged; "
            "try --dtype float32 or bfloat16."
        )
    if bool(logits.isposinf().any()):
        return "logits contain +inf: the model's numbers overflowed; try --dtype float32 or bfloat16."
    if row.edited:
        return (
            "no token may be generated: allowed_token_ids, min_tokens and the stop tokens exclude the "
            "whole vocabulary."
        )
    return "logits are -inf for the whole vocabulary: the model's weights are damaged."
