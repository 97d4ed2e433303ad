"""What the engine decides where the user said nothing."""

from __future__ import annotations

import pytest

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig, resolve


@pytest.mark.parametrize(
    ("device", "weight_tokens", "wanted", "decided"),
    [
        ("cpu", 5.4, None, 48),  # two Zen 4 cores, fast memory
        ("cpu", 12.1, None, 48),  # slow memory
        ("cpu", 70.2, None, 281),  # with AMX: more than the whole budget, so no limit
        ("cpu", 12.0, 24, 24),
        ("cpu", 12.0, 0, 0),
        ("cuda", 260.0, None, 0),
        ("cuda", 260.0, 512, 512),
    ],
)
def test_prompts_beside_decodes_are_limited_by_what_the_device_computes_while_it_reads(
    device: str, weight_tokens: float, wanted: int | None, decided: int
) -> None:
    config = EngineConfig(max_num_mixed_prefill_tokens=wanted)
    limits = resolve(config, device=device, max_model_len=4096, weight_tokens=weight_tokens)
    assert limits.max_num_mixed_prefill_tokens == decided


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(StartupError, match="--max-num-mixed-prefill-tokens must be at least 0, got -1"):
        EngineConfig(max_num_mixed_prefill_tokens=-1)
    config = EngineConfig(max_num_seqs=9, max_num_batched_tokens=8)
    with pytest.raises(StartupError, match="--max-num-seqs 9 is more than the 8 tokens of a step"):
        resolve(config, device="cpu", max_model_len=64, weight_tokens=12.0)
