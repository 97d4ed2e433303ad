"""The whole table "triton", under a real engine: the tokens that torch's operators give."""

from __future__ import annotations

import pytest

from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Add
from tests.engine.build import checkpoint
from tests.engine.fake import spec
from tests.engine.test_wiring import built
from tests.kernels.triton import DEVICE, needs_triton, quiet

pytestmark = [needs_triton, quiet]


def answers(loop: EngineLoop) -> dict[str, list[int]]:
    """A greedy request, and one that is sampled; they meet in mixed steps, for prompts come in chunks."""
    loop.handle(
        Add(spec("greedy", prompt=tuple(range(3, 12)), max_tokens=2, temperature=0.0, ignore_eos=True))
    )
    loop.handle(
        Add(spec("drawn", prompt=(5, 6, 7), max_tokens=2, temperature=0.9, top_k=20, seed=7, ignore_eos=True))
    )
    tokens: dict[str, list[int]] = {}
    while loop.has_work:
        for event in loop.step():
            assert event.failure is None, event.failure
            tokens.setdefault(event.request, []).extend(event.tokens)
    return tokens


@pytest.mark.parametrize("architecture", ["qwen3", "phi"])
def test_an_engine_gives_the_same_tokens(architecture: str) -> None:
    """Qwen3: norms of heads, a stack. Phi: layer norms, no gate, a partial rotation."""
    found = []
    for backend in ("triton", "torch"):
        with built(
            model=str(checkpoint(architecture)),
            device=DEVICE.type,
            attention_backend=backend,
            max_num_seqs=2,
            max_num_batched_tokens=8,
            block_size=16,
            kv_cache_memory_bytes=1 << 20,
        ) as engine:
            found.append(answers(engine.loop))
            name = engine.loop.executor._model.operations.name  # type: ignore[attr-defined]
            assert name == backend or backend == "torch"
    assert found[0] == found[1]
    assert {request: len(tokens) for request, tokens in found[0].items()} == {"greedy": 2, "drawn": 2}
