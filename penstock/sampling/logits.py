"""Edits of the logits before sampling, in vLLM's order: allowed tokens, min_tokens, bias, penalties.

    logits [R, V] float32, changed in place; only the elements that an edit names are read and written
    (an allow-list names all others of its row)

Temperature, min_p, top_k and top_p belong to `choose`: they need no edit of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import Row

_INF = float("inf")


def edit(logits: Tensor, rows: Sequence[Row], indices: Sequence[int]) -> None:
    """Apply every edit of `rows[i]` to `logits[i]`, for i in `indices`, in place."""
    forbidden: list[tuple[int, int]] = []
    biases: list[tuple[int, int, float]] = []
    penalised: list[int] = []
    for i in indices:
        row = rows[i]
        params = row.params
        if params.allowed_token_ids is not None:
            _allow_only(logits[i], params.allowed_token_ids)
        if row.holds_back_stop:
            forbidden.extend((i, token) for token in {*row.eos_ids, *params.stop_token_ids})
        biases.extend((i, token, bias) for token, bias in params.logit_bias.items())
        if row.penalised:
            penalised.append(i)
    if forbidden:
        where = torch.tensor(forbidden, device=logits.device)
        logits[where[:, 0], where[:, 1]] = -_INF
    if biases:
        where = torch.tensor([entry[:2] for entry in biases], device=logits.device)
        values = torch.tensor([entry[2] for entry in biases], dtype=logits.dtype, device=logits.device)
        logits[where[:, 0], where[:, 1]] += values  # no pair occurs twice: they are keys of dicts
    if penalised:
        _penalise(logits, rows, penalised)


def _allow_only(logits: Tensor, tokens: Sequence[int]) -> None:
    allowed = torch.tensor(tokens, device=logits.device)
    kept = logits[allowed]
    logits.fill_(-_INF)
    logits[allowed] = kept


def _penalise(logits: Tensor, rows: Sequence[Row], indices: Sequence[int]) -> None:
    """Repetition penalty over prompt and output, then frequency and presence penalty over the output.

    Repetition: Keskar et al., CTRL (2019), section 4.1, with negative logits multiplied, as everyone does.
    Frequency and presence: OpenAI's definition, `logit - count · frequency - (count > 0) · presence`.
    """
    ids, counts, lengths = bytearray(), bytearray(), []
    for i in indices:
        row = rows[i]
        row.seen.follow(row.tokens, row.prompt_len)
        ids += row.seen.ids.tobytes()
        counts += row.seen.counts.tobytes()
        lengths.append(len(row.seen.ids))
    if not ids:
        return
    device = logits.device
    token = torch.frombuffer(ids, dtype=torch.int64).to(device)
    count = torch.frombuffer(counts, dtype=torch.float32).to(device)
    per_row = torch.tensor(
        [
            (
                rows[i].params.repetition_penalty,
                rows[i].params.frequency_penalty,
                rows[i].params.presence_penalty,
            )
            for i in indices
        ],
        dtype=torch.float32,
    )
    spread = torch.tensor(lengths)
    row_of = torch.tensor(indices).repeat_interleave(spread).to(device)
    repetition, frequency, presence = per_row.repeat_interleave(spread, dim=0).to(device).unbind(1)
    value = logits[row_of, token]
    value = torch.where(value > 0, value / repetition, value * repetition)
    value -= frequency * count
    value -= presence * (count > 0)
    logits[row_of, token] = value
