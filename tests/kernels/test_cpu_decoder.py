"""All layers in one call against the same layers one call after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.kernels.attention import KVCache, Span, StepLayout
from penstock.kernels.cpu.decoder import DecoderStack, create_stack
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.linear import has_amx
from penstock.kernels.cpu.matrix import can_pack
from penstock.kernels.create import create_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import load_model
from tests.model.checkpoints import make_checkpoint

pytestmark = pytest.mark.skipif(
    available(wait_seconds=120) is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0"
)
CPU = torch.device("cpu")


#: (first position, tokens, block table) of each request in each step: prompts, more beside decode, decode.
SHORT = [
    [(0, 19, range(10, 1, -1)), (0, 6, range(11, 20))],
    [(19, 1, range(10, 1, -1)), (6, 11, range(11, 20)), (0, 3, range(20, 24))],
    [(20, 1, range(10, 1, -1)), (17, 1, range(11, 20)), (3, 1, range(20, 24))],
    [(21, 1, range(10, 1, -1))],
]
#: Contexts that are cut into parts by keys, more of them where there is no window.
LONG = [
    [(0, 1250, range(330, 0, -1)), (0, 40, range(340, 360))],
    [(1250, 1, range(330, 0, -1)), (40, 9, range(340, 360))],
    [(1251, 1, range(330, 0, -1)), (49, 1, range(340, 360))],
]


def load(directory: Path, dtype: torch.dtype, scheme: str | None = None) -> CausalLM:
    return load_model(directory, load_config(directory), create_operations(CPU, dtype), quantization=scheme)


def hidden_states(
    model: CausalLM, script: list[list[tuple[int, int, range]]]
) -> tuple[list[torch.Tensor], list[bool]]:
    """Of every step; and whether one call computed all of its layers."""
    spec = model.cache_spec(4)
    cache, backend = KVCache(spec, 400, CPU), model.operations.attention(spec)
    generator = torch.Generator().manual_seed(0)
    hidden: list[torch.Tensor] = []
    fused: list[bool] = []
    stack = model._stack
    if stack is None:
        fused = [False] * len(script)
    else:
        run = stack.run

        def noted(*arguments: object) -> torch.Tensor | None:
            result = run(*arguments)  # type: ignore[arg-type]
            fused.append(result is not None)
            return result

        stack.run = noted  # type: ignore[method-assign]
    for entries in script:
        spans = [Span(start, tokens, list(blocks)) for start, tokens, blocks in entries]
        layout = StepLayout(spans, spec.block_size)
        ids = torch.randint(0, model.config.vocab_size, (layout.num_tokens,), generator=generator)
        hidden.append(model.forward(ids, torch.from_numpy(layout.positions), backend.prepare(layout), cache))
    return hidden, fused


def assert_same(directory: Path, dtype: torch.dtype, scheme: str | None, long: bool) -> None:
    model = load(directory, dtype, scheme)
    script = LONG if long else SHORT
    together, fused = hidden_states(model, script)
    model._stack = None
    one_by_one, _ = hidden_states(model, script)
    assert all(fused) == (scheme is not None or model.operations.batch_invariant)
    for got, want in zip(together, one_by_one, strict=True):
        assert torch.equal(got, want)
        assert got.float().std() > 0.1


def test_a_stack_of_one_layer(tmp_path: Path) -> None:
    directory = make_checkpoint(
        tmp_path, "qwen3", hidden_size=128, intermediate_size=192, num_hidden_layers=1
    )
    assert_same(directory, torch.bfloat16, "int8", long=False)


def test_a_stack_takes_as_many_rows_as_the_least_of_its_weights(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=192)
    stack = load(directory, torch.bfloat16, "int8")._stack
    assert isinstance(stack, DecoderStack)
    panels = stack._layers[0].out[0].panels  # type: ignore[attr-defined]
    panels.most_rows = 5
    again = create_stack(stack._library, torch.bfloat16, stack._layers, stack._eps, stack._scale)
    assert again is not None
    assert again._most_rows == 5


def _reads_onednn() -> bool:
    found = available()
    assert found is not None
    return can_pack(torch.bfloat16) and found.multiplies_bf16 and not has_amx()


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("scheme", [None, "int8", "w8a8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen2", "qwen3", "mistral"])
def test_bits_are_those_of_single_calls(
    kind: str, dtype: torch.dtype, scheme: str | None, threads: int, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path, kind, hidden_size=128, intermediate_size=192)
    assert_same(directory, dtype, scheme, long=False)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of 70 million weights: made once, and in the type that they are read in."""
    options = {"hidden_size": 4224, "intermediate_size": 1280, "num_hidden_layers": 1}
    return make_checkpoint(tmp_path_factory.mktemp("deep"), "llama", dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_deep_inputs_and_many_gates(scheme: str | None, threads: int, deep: Path) -> None:
    """Sums of all rows and gates are kept side by side; a thread takes several pairs of panels at once."""
    assert_same(deep, torch.bfloat16, scheme, long=False)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("kind", ["qwen2-window", "qwen3"])
def test_long_contexts_of_layers_with_and_without_a_window(kind: str, threads: int, tmp_path: Path) -> None:
    """Two kinds of layers share the memory for partial results, and need different amounts of it."""
    options = {"sliding_window": 600} if kind == "qwen2-window" else {}
    directory = make_checkpoint(
        tmp_path, kind, hidden_size=128, intermediate_size=192, max_position_embeddings=2048, **options
    )
    assert_same(directory, torch.bfloat16, "int8", long=True)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_only_the_rows_that_are_wanted_leave_the_last_layer(
    scheme: str | None, threads: int, tmp_path: Path
) -> None:
    """Their bits, and all keys and values in the cache, are those of computing all rows."""
    directory = make_checkpoint(tmp_path, "qwen3", hidden_size=128, intermediate_size=192)
    model = load_model(
        directory, load_config(directory), create_operations(CPU, torch.bfloat16), quantization=scheme
    )
    spec = model.cache_spec(4)
    layout = StepLayout([Span(0, 9, range(3)), Span(0, 1, [4]), Span(0, 6, [6, 5])], 4)
    ids = torch.randint(0, model.config.vocab_size, (16,), generator=torch.Generator().manual_seed(1))
    rows: list[list[int] | None] = [None, [9], [0, 8, 9, 15], [], list(range(16))]
    if scheme is None and not _reads_onednn():
        pytest.skip("oneDNN's panels are not read here")
    for stack in (model._stack, None):
        model._stack = stack
        states, caches = [], []
        for wanted in rows:
            cache, backend = KVCache(spec, 8, CPU), model.operations.attention(spec)
            for half in (half for layer in cache.layers for half in layer):
                half.zero_()
            positions = torch.from_numpy(layout.positions)
            states.append(model.forward(ids, positions, backend.prepare(layout), cache, wanted))
            caches.append(torch.stack([half for layer in cache.layers for half in layer]))
        for wanted, got, written in zip(rows, states, caches, strict=True):
            assert torch.equal(got, states[0] if wanted is None else states[0][wanted])
            assert torch.equal(written, caches[0])


def test_gates_that_do_not_fill_panels_are_left_to_single_calls(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=96)
    model = load_model(
        directory, load_config(directory), create_operations(CPU, torch.bfloat16), quantization="int8"
    )
    _, fused = hidden_states(model, SHORT)
    assert not any(fused)


def test_what_the_stack_refuses(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=192)
    model = load_model(
        directory, load_config(directory), create_operations(CPU, torch.bfloat16), quantization="int8"
    )
    spec = model.cache_spec(4)
    cache, backend = KVCache(spec, 8, CPU), model.operations.attention(spec)
    layout = StepLayout([Span(0, 5, [1, 2])], 4)
    positions = torch.arange(6)
    with pytest.raises(ValueError, match="6 rows; prepared for 5"):
        model.forward(torch.arange(6), positions, backend.prepare(layout), cache)
    outside = backend.prepare(StepLayout([Span(0, 5, [1, 20])], 4))
    with pytest.raises(IndexError, match="blocks"):
        model.forward(torch.arange(5), positions[:5], outside, cache)
    for stack in (model._stack, None):
        model._stack = stack
        for wanted in ([5], [-1], [2, 1], [3, 3], [0, 1, 2, 4, 3]):
            with pytest.raises(ValueError, match="need ascending ones"):
                model.forward(torch.arange(5), positions[:5], backend.prepare(layout), cache, wanted)


@pytest.mark.parametrize("rows", [8, 9])
def test_batches_that_amx_computes_faster_are_left_to_it(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _reads_onednn():
        pytest.skip("oneDNN's panels are not read here")
    for module in ("linear", "matrix"):  # the second: whether a batch-invariant form is free
        monkeypatch.setattr(f"penstock.kernels.cpu.{module}.has_amx", lambda: True)
    directory = make_checkpoint(tmp_path, "llama", hidden_size=128, intermediate_size=192)
    model = load(directory, torch.bfloat16)
    _, fused = hidden_states(model, [[(0, rows, range(1, 10))]])
    assert fused == [rows <= 8]
