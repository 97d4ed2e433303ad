"""What finds the first output that is not finite, on its own and in a model; and rows that are wanted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels.attention import KVCache, Span, StepLayout
from penstock.kernels.create import create_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import load_model
from penstock.model.watch import NonFinite, Watch
from tests.model.checkpoints import make_checkpoint

CPU = torch.device("cpu")
TOKENS = 7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 3), (3, 1)])
def test_one_bad_number_is_found_where_it_is(value: float, row: int, column: int) -> None:
    out = torch.zeros(4, 2, 2)
    out.view(4, 4)[row, column] = value
    watch = Watch()
    watch.look("a part", torch.zeros(4, 4))
    assert watch.found is None
    watch.look("another", out, first_row=10)
    assert watch.found == NonFinite("another", 10 + row, "NaN" if math.isnan(value) else "inf")
    watch.look("a third", torch.full((4, 4), math.nan))
    assert watch.found.part == "another", "the first one counts"


def test_of_several_rows_the_first_and_nan_before_inf() -> None:
    watch = Watch()
    watch.look("x", torch.tensor([[0.0, 0.0], [math.inf, math.nan], [math.nan, 0.0]]))
    assert watch.found == NonFinite("x", 1, "NaN")


def model_of(directory: Path, name: str, **changes: Any) -> CausalLM:
    folder = make_checkpoint(directory, name, **changes)
    return load_model(folder, load_config(folder), create_operations(CPU, torch.float32))


def inputs(model: CausalLM) -> tuple[Any, ...]:
    spec = model.cache_spec(4)
    layout = StepLayout([Span(0, TOKENS, [0, 1])], 4)
    step = model.operations.attention(spec).prepare(layout)
    ids = torch.arange(TOKENS) + 5
    return ids, torch.from_numpy(layout.positions), step, KVCache(spec, 4, CPU)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt-neox", "falcon"])
def test_wanted_rows_are_rows_of_all(name: str, tmp_path: Path) -> None:
    """With a stack of layers in one piece (llama) and without."""
    model = model_of(tmp_path, name)
    hidden = model.forward(*inputs(model))
    assert hidden.shape == (TOKENS, model.config.hidden_size)
    rows = [1, 4, 6]
    some = model.forward(*inputs(model), wanted=rows)
    torch.testing.assert_close(some, hidden[rows])


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_bad_output_layer_is_blamed_on_the_last_row(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, name)
    assert model.find_non_finite(*inputs(model)) is None
    bad = torch.full((1, model.config.vocab_size), math.inf)
    model._head = lambda hidden: bad.expand(len(hidden), -1)  # type: ignore[assignment]
    assert model.find_non_finite(*inputs(model)) == NonFinite("the output layer", TOKENS - 1, "inf")
