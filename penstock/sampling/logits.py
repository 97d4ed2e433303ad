"""Edits of the logits before sampling, in vLLM's order: allowed tokens, bad words, min_tokens, bias,
penalties.

    logits [R, V] float32, changed in place; only the elements that an edit names are read and written
    (an allow-list names all others of its row)

Temperature, min_p, top_k and top_p belong to the draw: they need no edit of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.transfer import on_device

from .state import SamplingState

_INF = float("inf")


def edit(logits: Tensor, states: Sequence[SamplingState], indices: Sequence[int]) -> None:
    """Apply every edit of `states[i]` to `logits[i]`, for i in `indices`, in place."""
    forbidden: list[tuple[int, Tensor]] = []
    biased: list[tuple[int, Tensor]] = []
    biases: list[Tensor] = []
    penalised: list[int] = []
    for i in indices:
        state = states[i]
        edits = state.edits.on(logits.device)
        if edits.allowed is not None:
            edits.allow_only(logits[i])
        if state.holds_back_stop and state.grammar is None:  # else its mask holds them back
            forbidden.append((i, edits.forbidden))
        if state.params.bad_words_ids and (bad := state.bad):
            forbidden.append((i, on_device(torch.tensor(bad), logits.device)))
        if len(edits.biased):
            biased.append((i, edits.biased))
            biases.append(edits.biases)
        if state.penalised:
            penalised.append(i)
    if forbidden:
        logits[_places(forbidden)] = -_INF
    if biased:
        logits[_places(biased)] += torch.cat(biases)  # no pair occurs twice: they are keys of dicts
    if penalised:
        _penalise(logits, states, penalised)


def _places(entries: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """(row, token) of each token [K] of each row, all in one."""
    lengths = torch.tensor([len(tokens) for _, tokens in entries])
    tokens = torch.cat([tokens for _, tokens in entries])
    rows = torch.tensor([row for row, _ in entries]).repeat_interleave(lengths)
    return on_device(rows, tokens.device), tokens


def _penalise(logits: Tensor, states: Sequence[SamplingState], indices: Sequence[int]) -> None:
    """Repetition penalty over prompt and output, then frequency and presence penalty over the output.

    Repetition: Keskar et al., CTRL (2019), section 4.1, with negative logits multiplied, as everyone does.
    Frequency and presence: OpenAI's definition, `logit - count · frequency - (count > 0) · presence`.
    """
    ids, counts, lengths = bytearray(), bytearray(), []
    for i in indices:
        state = states[i]
        state.seen.follow(state.tokens, state.prompt_len)
        ids += state.seen.ids.tobytes()
        counts += state.seen.counts.tobytes()
        lengths.append(len(state.seen.ids))
    if not ids:
        return
    device = logits.device
    token = on_device(torch.frombuffer(ids, dtype=torch.int64), device)
    count = on_device(torch.frombuffer(counts, dtype=torch.float32), device)
    per_row = torch.tensor(
        [
            (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            for params in (states[i].params for i in indices)
        ],
        dtype=torch.float32,
    )
    spread = torch.tensor(lengths)
    row_of = on_device(torch.tensor(indices).repeat_interleave(spread), device)
    repetition, frequency, presence = on_device(per_row.repeat_interleave(spread, dim=0), device).unbind(1)
    value = logits[row_of, token]
    value = torch.where(value > 0, value / repetition, value * repetition)
    value -= frequency * count
    value -= presence * (count > 0)
    logits[row_of, token] = value
