"""Grammar masks: what each constrained row may sample, for the whole batch at once.

    states ─▶ matchers follow their tokens ─▶ masks [rows, words] of bits ─▶ logits of forbidden tokens: -inf

A row whose matcher fails gets an error, and its request alone ends by it. The end of the output is a token
like others: the grammar allows it where the output matches, and allows nothing else when nothing may follow.
So it ends with the grammar, whatever min_tokens or ignore_eos say."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.grammar.compiler import MOST_SECONDS, Masks, Matcher
from penstock.kernels.transfer import on_device

from .state import SamplingState

_INF = float("inf")


def constrain(logits: Tensor, states: Sequence[SamplingState], rows: Sequence[int]) -> dict[int, str]:
    """Set what grammars forbid to -inf, in place.

    Args:
        logits: [R, V] float32, after all other edits.
        rows: those whose states have a grammar.

    Returns why a row cannot be sampled, by row.
    """
    matchers: list[Matcher] = []
    for row in rows:
        state = states[row]
        assert state.grammar is not None  # that is what makes it one of `rows`
        state.grammar.follow(state.tokens, state.prompt_len)
        matchers.append(state.grammar)
    words = max((logits.shape[1] + 31) // 32, *(matcher.words for matcher in matchers))
    masks = np.zeros((len(rows), words), np.int32)
    times = [time.perf_counter()]
    began = time.thread_time()
    for place, (row, matcher) in enumerate(zip(rows, matchers, strict=True)):
        matcher.fill(masks, place)
        if states[row].holds_back_stop:
            _hold_back(masks[place], states[row].ends)
        times.append(time.perf_counter())
    if (seconds := time.thread_time() - began) > MOST_SECONDS:
        took = [after - before for before, after in itertools.pairwise(times)]
        slowest = took.index(max(took))
        matchers[slowest].give_up(seconds, masks, slowest)
    failed = {row: matcher.error for row, matcher in zip(rows, matchers, strict=True) if matcher.error}
    forbidden = _forbidden(masks, logits)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -_INF)
    else:
        places = on_device(torch.tensor(rows), logits.device)
        logits[places] = logits[places].masked_fill_(forbidden, -_INF)
    return failed


def _hold_back(mask: Masks, ends: Sequence[int]) -> None:
    """min_tokens, as far as the grammar goes: nothing that ends the output, unless nothing else is left."""
    held = mask.copy()
    bits = held.view(np.uint32)
    for token in ends:
        bits[token >> 5] &= ~np.uint32(1 << (token & 31))
    if held.any():
        mask[:] = held


def _forbidden(masks: Masks, logits: Tensor) -> Tensor:
    """bool [rows, V]: the bits that are not set."""
    vocabulary = logits.shape[1]
    if logits.device.type == "cpu":
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=vocabulary, bitorder="little")
        return torch.from_numpy(bits == 0)
    words = on_device(masks, logits.device)
    each = torch.arange(32, dtype=torch.int32, device=logits.device)
    return ((words.unsqueeze(-1) >> each) & 1).flatten(1)[:, :vocabulary] == 0
