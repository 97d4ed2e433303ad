"""All layers in one call against the same layers one call after the other, and what happens where a kernel
cannot be compiled."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels.attention import KVCache, Span, StepLayout
from penstock.kernels.torch_operations import torch_operations
from penstock.kernels.triton import attention_kernels, norm_kernels, norms
from penstock.kernels.triton.operations import triton_operations
from penstock.kernels.triton.stack import TritonStack
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import load_model
from tests.model.checkpoints import make_checkpoint

from .triton import DEVICE, needs_triton, quiet, table

pytestmark = [needs_triton, quiet]

#: Two prompts; then decode.
STEPS = [[(0, 4, [3, 1]), (0, 2, [2])], [(4, 1, [3, 1]), (2, 1, [2])]]


def load(directory: Path, dtype: torch.dtype) -> CausalLM:
    return load_model(directory, load_config(directory), table(dtype))


def spans(step: list[tuple[int, int, list[int]]]) -> StepLayout:
    return StepLayout([Span(*span) for span in step], 8)


def run(model: CausalLM, *, reserved: bool = False, wanted: bool = False) -> list[torch.Tensor]:
    """Hidden states of every step. reserved: its last ones, decode, by a step that stays in its place."""
    spec = model.cache_spec(8)
    cache, backend = KVCache(spec, 5, DEVICE), model.operations.attention(spec)
    generator = torch.Generator().manual_seed(0)
    hidden = []
    for entries in STEPS:
        layout = spans(entries)
        rows, padding = layout.num_tokens, 0
        attention: Any = backend.prepare(layout)
        if reserved and entries is STEPS[-1]:
            attention, padding = backend.reserve(4, 16), 2  # type: ignore[attr-defined]
            attention.update(layout)
        ids = torch.randint(0, model.config.vocab_size, (rows,), generator=generator)
        ids = torch.nn.functional.pad(ids, (0, padding)).to(DEVICE)
        positions = torch.nn.functional.pad(torch.from_numpy(layout.positions), (0, padding)).to(DEVICE)
        only = layout.last_rows if wanted else None
        states = model.forward(ids, positions, attention, cache, only)
        hidden.append(states if wanted else states[:rows])
    return hidden


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("qwen3", torch.bfloat16)],
)
def test_a_stack_computes_the_bits_of_single_calls(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(make_checkpoint(tmp_path, architecture, seed=0), dtype)
    assert isinstance(model._stack, TritonStack)
    together = run(model)
    # products of another number of rows may have other bits: those that are chosen, and padding
    some, padded = run(model, wanted=True), run(model, reserved=True)
    assert model._stack._proven
    model._stack = None
    for layout, rows, last_rows, fixed, single in zip(
        map(spans, STEPS), together, some, padded, run(model), strict=True
    ):
        assert torch.equal(rows, single)
        torch.testing.assert_close(last_rows, single[layout.last_rows])
        torch.testing.assert_close(fixed, single)


class Broken:
    """A kernel that no compiler takes."""

    starts = 0

    def __getitem__(self, grid: object) -> Broken:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        Broken.starts += 1
        raise RuntimeError("PassManager::run failed\nand much more")


@pytest.mark.parametrize("kernel", ["attend", "add"])
def test_a_kernel_that_cannot_be_compiled_hands_everything_to_the_other_table(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it happens in a step: the step's results are those of the other table; one warning says it."""
    directory = make_checkpoint(tmp_path, "qwen3", seed=0)
    model = load(directory, torch.float32)
    plain = load_model(directory, load_config(directory), torch_operations(DEVICE, torch.float32))
    Broken.starts = 0
    if kernel == "add":  # the stack's own: the first norm of a layer works, the second one does not
        monkeypatch.setattr(norms, "add_rms_norm", Broken())
    else:
        monkeypatch.setattr(attention_kernels, kernel, Broken())
    for got, want in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "Triton's kernels cannot be used, torch's operators are slower: RuntimeError: PassManager::run failed"
    ]
    assert Broken.starts == 1, "nothing was tried again"
    assert model.operations.attention(model.cache_spec(8)).reserve(1, 1) is None  # type: ignore[attr-defined]


def test_without_a_compiler_there_is_no_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(norm_kernels, "rms_norm", Broken())
    assert triton_operations(torch_operations(DEVICE, torch.float32)) is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: device-side assert"),
        ValueError("no"),
    ],
    ids=str,
)
def test_other_errors_are_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = table(torch.float32)

    class Raising(Broken):
        def __call__(self, *arguments: object, **constants: object) -> None:
            raise error

    monkeypatch.setattr(norm_kernels, "rms_norm", Raising())
    x = torch.ones(1, 8, device=DEVICE)
    with pytest.raises(type(error), match=str(error)):
        operations.rms_norm(x, x[0], 1e-6)
