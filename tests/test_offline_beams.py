"""LLM.beam_search against transformers' generate(num_beams=…), on the demo model in float32.

Where nothing ends a continuation early, both search alike: the same continuations with the same sums. Where
an end-of-sequence token may, transformers drops ends that are not among the best `num_beams` of their step,
and stops when its own bound says so; vLLM, and this, keep all and go on: no sum here is less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from penstock import LLM, BeamSearchParams
from penstock.model.hub import resolve_model
from tests.model.checkpoints import oracle

PROMPTS = ("zq#! 77", "A Pod is", "Search for")
LENGTH = 8


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM("demo", dtype="float32", kv_cache_memory_bytes=32 << 20, threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def theirs(llm: LLM) -> Any:
    return oracle(resolve_model("demo"))


def their_beams(
    model: Any, ids: list[int], width: int, ends: list[int] | None
) -> list[tuple[list[int], float]]:
    """(generated tokens, the one that ends them included; sum of their logprobs), the best first."""
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=LENGTH,
        length_penalty=0.0,  # the score is the sum
        early_stopping="never",
        eos_token_id=ends,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    beams = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = row[len(ids) :]
        stop = next((at for at, token in enumerate(tokens, 1) if token in (ends or ())), len(tokens))
        beams.append((tokens[:stop], score))
    return beams


@pytest.mark.parametrize(("width", "penalty"), [(2, 0.0), (5, 1.0)])
def test_both_find_the_same(llm: LLM, theirs: Any, width: int, penalty: float) -> None:
    """All continuations have one length: a penalty of it orders them alike."""
    prompts = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    params = BeamSearchParams(beam_width=width, max_tokens=LENGTH, ignore_eos=True, length_penalty=penalty)
    for ids, found in zip(prompts, llm.beam_search(prompts, params), strict=True):
        wanted = their_beams(theirs, ids, width, None)
        assert [beam.tokens[len(ids) :] for beam in found.sequences] == [tokens for tokens, _ in wanted]
        sums = [beam.cum_logprob for beam in found.sequences]
        assert sums == pytest.approx([score for _, score in wanted], abs=1e-3)


@pytest.mark.parametrize("width", [2, 4])
def test_ends_are_found_at_least_as_well(llm: LLM, theirs: Any, width: int) -> None:
    """With a token that both often find: each sum is as great, and what both have found has one sum."""
    prompts = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    ends = list(llm._engine.info.eos_ids)
    params = BeamSearchParams(
        beam_width=width, max_tokens=LENGTH, length_penalty=0.0, include_stop_str_in_output=True
    )
    both = 0
    for ids, found in zip(prompts, llm.beam_search(prompts, params), strict=True):
        ours = {tuple(beam.tokens[len(ids) :]): beam.cum_logprob for beam in found.sequences}
        wanted = their_beams(theirs, ids, width, ends)
        for own, (tokens, score) in zip(ours.values(), wanted, strict=True):
            assert own >= score - 1e-3
            if tuple(tokens) in ours:
                both += 1
                assert ours[tuple(tokens)] == pytest.approx(score, abs=1e-3)
    assert both >= len(PROMPTS)
