"""Bad words, and users' processors of logits."""

from __future__ import annotations

from types import SimpleNamespace  # a class without the methods
from typing import Any, ClassVar

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.core.sampling_params import Sampling
from penstock.sampling.processors import BatchUpdate, Processors, load
from penstock.sampling.sampler import Sampler
from penstock.sampling.state import SamplingState

from . import current

VOCABULARY = 16


def state(name: str, output: list[int] | None = None, **params: Any) -> SamplingState:
    chosen = Sampling(**{"temperature": 0.0, **params})
    return SamplingState(name, chosen, prompt_len=2, tokens=[1, 2, *(output or [])])


def sample(states: list[SamplingState], processors: Processors | None = None) -> list[int]:
    logits = torch.arange(VOCABULARY, dtype=torch.float32).repeat(len(states), 1)
    assert current.operations is not None
    return [each.token for each in Sampler(current.operations, processors).sample(logits, states)]


def test_bad_words_are_forbidden_where_they_would_be_complete() -> None:
    words = ((15,), (14, 13), (7, 14))
    assert sample([state("a", bad_words_ids=words)]) == [14]
    assert sample([state("a", [7], bad_words_ids=words)]) == [13]
    assert sample([state("a", [7, 14], bad_words_ids=words)]) == [14]  # 13 would complete a word, 14 does not
    assert sample([state("a", [14], bad_words_ids=((14, 15),)), state("b")]) == [14, 15]
    # only the output counts: the prompt ends with 2
    assert sample([state("a", bad_words_ids=((2, 15),))]) == [15]


class Only:
    """Allows what the request's extra_args say; keeps what it was told."""

    updates: ClassVar[list[BatchUpdate | None]] = []

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        assert vllm_config.scheduler_config.max_num_seqs == 8
        assert vllm_config.model_config.get_vocab_size() == VOCABULARY
        self.rows: dict[int, tuple[int | None, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self.updates.append(batch_update)
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            assert prompt == [1, 2]
            self.rows[row] = (params.extra_args.get("only"), output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (token, output) in self.rows.items():
            if token == 99:
                raise ValueError("99 is none")
            if token is not None:
                logits[row] = float("-inf")
                logits[row, (token + len(output)) % VOCABULARY] = 0.0
        return logits


def made() -> Processors:
    (kind,) = load([f"{__name__}:Only"])
    return Processors([kind], torch.device("cpu"), max_num_seqs=8, vocab_size=VOCABULARY)


def test_a_processor_sees_who_is_in_which_row() -> None:
    Only.updates.clear()
    processors = made()
    first, second, third = state("a", extra_args={"only": 3}), state("b"), state("c", extra_args={"only": 9})
    assert sample([first, second], processors) == [3, 15]
    first.tokens.append(3)
    second.tokens.append(15)
    assert sample([first, second], processors) == [4, 15]  # its list has grown
    assert Only.updates[-1] is None
    assert sample([third, second, first], processors) == [9, 15, 4]
    assert sample([first], processors) == [4]
    last = Only.updates[-1]
    assert last is not None
    assert (last.batch_size, sorted(last.removed)) == (1, [0, 1, 2])
    assert [row for row, *_ in last.added] == [0]


def test_a_processor_that_raises_takes_nobody_with_it_for_ever() -> None:
    processors = made()
    bad, fine = state("bad", extra_args={"only": 99}), state("fine", extra_args={"only": 3})
    with pytest.raises(ValueError, match="99 is none"):
        sample([bad, fine], processors)
    with pytest.raises(ValueError):
        sample([bad], processors)
    assert sample([fine], processors) == [3]
    assert sample([state("", extra_args={"only": 99})], processors) == [15]  # the engine's own probe


@pytest.mark.parametrize(
    "name",
    [
        "nowhere:X",
        "tests.sampling.test_processors",
        "math:pi",
        f"{SimpleNamespace.__module__}:SimpleNamespace",
    ],
)
def test_what_is_no_processor(name: str) -> None:
    with pytest.raises(StartupError, match="--logits-processors"):
        load([name])
