"""Every architecture against transformers, on small random checkpoints: logits within 1e-4 in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels.attention import AttentionBackend, KVCache, Span, StepLayout
from penstock.kernels.create import create_operations
from penstock.kernels.operations import Operations
from penstock.kernels.reference import reference_operations
from penstock.kernels.torch_operations import torch_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config, supported_architectures
from penstock.model.loader import load_model
from tests.model.checkpoints import ARCHITECTURES, make_checkpoint, oracle

CPU = torch.device("cpu")
BLOCK = 4
PROMPT = torch.randint(0, 128, (61,), generator=torch.Generator().manual_seed(1))


class Runner:
    """A model with a cache, fed like an executor would."""

    def __init__(self, model: CausalLM, backend: str | None = "torch") -> None:
        """backend: of attention, instead of that of the model's own table."""
        self.model = model
        spec = model.cache_spec(BLOCK)
        self.cache = KVCache(spec, 64, CPU)
        operations = model.operations
        if backend is not None:
            operations = create_operations(CPU, model.dtype, attention=backend)
        self.backend: AttentionBackend = operations.attention(spec)

    def step(self, *parts: tuple[torch.Tensor, int, list[int]]) -> list[torch.Tensor]:
        """Logits of every token of each (token ids, start, block table)."""
        layout = StepLayout([Span(start, len(ids), blocks) for ids, start, blocks in parts], BLOCK)
        hidden = self.model.forward(
            torch.cat([ids for ids, _, _ in parts]),
            torch.from_numpy(layout.positions),
            self.backend.prepare(layout),
            self.cache,
        )
        assert hidden.shape == (layout.num_tokens, self.model.config.hidden_size)
        logits = self.model.logits(hidden).float()
        assert logits.dtype == torch.float32
        return list(torch.tensor_split(logits, layout.query_starts[1:-1]))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(arch), arch)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    """Logits of transformers for a prompt, [len, vocab]."""
    model = oracle(directory)

    @functools.cache
    def logits(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(torch.tensor([ids])).logits[0]
        return out

    return logits


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    return load_model(directory, load_config(directory), create_operations(CPU, torch.float32))


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.std() > 1, "the checkpoint's logits are not worth comparing"
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_whole_prompt(model: CausalLM, reference: Any) -> None:
    (got,) = Runner(model).step((PROMPT, 0, list(range(20, 0, -1))))
    agree(got, reference(tuple(PROMPT.tolist())))


@pytest.mark.parametrize("make", [create_operations, torch_operations, reference_operations])
def test_every_table_of_operations_serves(
    directory: Path, reference: Any, make: Callable[[torch.device, torch.dtype], Operations]
) -> None:
    whole = load_model(directory, load_config(directory), make(CPU, torch.float32))
    (got,) = Runner(whole, backend=None).step((PROMPT, 0, list(range(20, 0, -1))))
    agree(got, reference(tuple(PROMPT.tolist())))


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_in_chunks(model: CausalLM, reference: Any, chunk: int) -> None:
    runner, parts = Runner(model), []
    for start in range(0, len(PROMPT), chunk):
        parts += runner.step((PROMPT[start : start + chunk], start, list(range(40, 20, -1))))
    agree(torch.cat(parts), reference(tuple(PROMPT.tolist())))


def test_requests_of_all_kinds_in_one_step(model: CausalLM, reference: Any) -> None:
    """Decode rows, a first chunk, a later chunk, and a new request on a prefix that this step writes."""
    runner = Runner(model)
    a, b, c = PROMPT[:30], PROMPT[20:33], PROMPT.flip(0)[:23]
    d = torch.cat((c[:8], PROMPT[:9]))
    tables = {"a": list(range(10)), "b": list(range(10, 14)), "c": list(range(20, 26))}
    tables["d"] = [*tables["c"][:2], 30, 31, 32]
    runner.step((a[:13], 0, tables["a"]), (b[:12], 0, tables["b"]))
    got_b, got_a, got_d, got_c = runner.step(
        (b[12:], 12, tables["b"]), (a[13:], 13, tables["a"]), (d[8:], 8, tables["d"]), (c, 0, tables["c"])
    )
    agree(got_a, reference(tuple(a.tolist()))[13:])
    agree(got_b, reference(tuple(b.tolist()))[12:])
    agree(got_c, reference(tuple(c.tolist())))
    agree(got_d, reference(tuple(d.tolist()))[8:])


def test_parameters_are_counted(model: CausalLM, directory: Path) -> None:
    parameters = {id(p): p for p in oracle(directory).parameters()}  # a tied head is the same object
    assert model.num_parameters == sum(p.numel() for p in parameters.values())
    table = model.config.vocab_size * model.config.hidden_size
    copied = table if model.config.tie_word_embeddings and model._head.copied else 0
    # the last panel of a matrix is filled up; where weights stay as they came, every byte is a parameter's
    assert model.weight_bytes >= 4 * (model.num_parameters + copied)
    plain = load_model(directory, load_config(directory), torch_operations(CPU, torch.float32))
    assert plain.weight_bytes == 4 * plain.num_parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(directory: Path, reference: Any, dtype: torch.dtype) -> None:
    """Errors are of the size of the dtype's rounding, and no larger than transformers' own."""
    model = load_model(directory, load_config(directory), create_operations(CPU, dtype))
    (got,) = Runner(model).step((PROMPT, 0, list(range(20))))
    want = reference(tuple(PROMPT.tolist()))
    with torch.no_grad():
        theirs = oracle(directory, dtype)(PROMPT[None]).logits[0].float()

    def error(logits: torch.Tensor) -> float:
        return float((logits - want).norm() / want.norm())

    assert error(got) <= 1.3 * error(theirs) < 0.1
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.85


def test_every_supported_architecture_is_tested(tmp_path: Path) -> None:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    names |= {"phi": "Phi", "gpt-neox": "GPTNeoX", "falcon": "Falcon"}
    assert {f"{name}ForCausalLM" for name in names.values()} == set(supported_architectures())
    assert set(names) <= set(ARCHITECTURES)


def test_the_reference_backend_serves_too(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "qwen2-window")
    model = load_model(directory, load_config(directory), create_operations(CPU, torch.float32))
    blocks = list(range(20))
    want = Runner(model).step((PROMPT[:20], 0, blocks))[0]
    agree(Runner(model, "reference").step((PROMPT[:20], 0, blocks))[0], want)
