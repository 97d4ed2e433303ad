"""The short form of `python -m benchmarks.structured.valid`, which has ten thousand of them."""

from __future__ import annotations

import pytest

from benchmarks.structured.valid import measure
from penstock import LLM

pytest.importorskip("llguidance", reason="structured outputs need llguidance")


def test_every_finished_output_is_valid_against_its_schema() -> None:
    llm = LLM("demo", threads=1, max_num_seqs=64, kv_cache_memory_bytes=64 << 20)
    try:
        result = measure(llm, 300, seed=1, temperature=2.0, max_tokens=250, told=lambda _: None)
    finally:
        llm.close()
    assert not result.wrong
    assert not result.refused
    assert result.finished + result.cut == 300
    assert result.cut <= 30
