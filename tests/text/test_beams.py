"""Beam search against all there is: with a beam for every prefix it finds what an exhaustive search finds."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.core.plan import TokenLogprob
from penstock.core.sampling_params import BeamSearchParams
from penstock.text.beams import Beam, BeamSearch

VOCAB = 4


def logprobs(seed: int, tokens: tuple[int, ...]) -> list[float]:
    """A model: the logprobs of the next token."""
    rng = random.Random(f"{seed} {tokens}")
    weights = [rng.random() + 0.01 for _ in range(VOCAB)]
    return [math.log(weight / sum(weights)) for weight in weights]


def search(seed: int, width: int, length: int, penalty: float, eos: tuple[int, ...]) -> list[Beam]:
    found = BeamSearch((9, 9), width=width, max_tokens=length, length_penalty=penalty, eos_ids=eos)
    while not found.done:
        positions = []
        for ask in found.asks:
            values = logprobs(seed, ask[2:])
            ranked = sorted(range(VOCAB), key=lambda token: -values[token])[: 2 * width]
            top = tuple((token, values[token]) for token in ranked)
            positions.append(TokenLogprob(token=ranked[0], logprob=top[0][1], rank=1, top=top))
        found.take(positions)
    return found.best()


def every(seed: int, length: int, eos: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """All continuations, ended or of the full length, and their sums of logprobs."""
    found: dict[tuple[int, ...], float] = {}
    for full in itertools.product(range(VOCAB), repeat=length):
        total = 0.0
        for i, token in enumerate(full):
            total += logprobs(seed, full[:i])[token]
            if token in eos:
                found[full[: i + 1]] = total
                break
        else:
            found[full] = total
    return found


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_with_room_for_all_it_is_exhaustive(seed: int, length: int, penalty: float, ends: bool) -> None:
    eos = (3,) if ends else ()
    width = VOCAB**length

    def score(tokens: tuple[int, ...], total: float) -> float:
        ended = bool(tokens) and tokens[-1] in eos
        return total / (2 + len(tokens) - ended) ** penalty

    all_of_them = every(seed, length, eos)
    best = sorted((score(tokens, total) for tokens, total in all_of_them.items()), reverse=True)
    beams = search(seed, width, length, penalty, eos)
    assert len(beams) == len(all_of_them)
    for beam, wanted in zip(beams, best, strict=True):
        ended = () if beam.stop_reason is None else (beam.stop_reason,)
        assert beam.logprob == pytest.approx(all_of_them[beam.tokens + ended])
        assert score(beam.tokens + ended, beam.logprob) == pytest.approx(wanted)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_narrow_search_is_greedy_at_least(seed: int, width: int, length: int) -> None:
    beams = search(seed, width, length, 0.0, ())
    assert len(beams) == min(width, VOCAB**length)
    assert [beam.logprob for beam in beams] == sorted((beam.logprob for beam in beams), reverse=True)
    assert len({beam.tokens for beam in beams}) == len(beams)
    greedy: tuple[int, ...] = ()
    total = 0.0
    for _ in range(length):
        values = logprobs(seed, greedy)
        token = max(range(VOCAB), key=values.__getitem__)
        greedy, total = (*greedy, token), total + values[token]
    if width == 1:
        assert beams[0].tokens == greedy
        assert beams[0].logprob == pytest.approx(total)


@pytest.mark.parametrize(
    "fields", [{"beam_width": 0}, {"beam_width": 129}, {"max_tokens": 0}, {"length_penalty": 11.0}]
)
def test_parameters_out_of_range(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(fields))):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})  # type: ignore[arg-type]
