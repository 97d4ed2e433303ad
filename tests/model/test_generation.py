"""generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import ModelLoadError
from penstock.core.sampling_params import SamplingParams
from penstock.model.generation import load_generation_config


def test_without_a_file(tmp_path: Path) -> None:
    config = load_generation_config(tmp_path)
    assert config.eos_ids == ()
    assert config.sampling == {}


def test_fields(tmp_path: Path) -> None:
    raw = {
        "eos_token_id": [7, 9],
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "max_new_tokens": 512,
        "do_sample": True,
        "transformers_version": "4.51.0",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    config = load_generation_config(tmp_path)
    assert config.eos_ids == (7, 9)
    params = SamplingParams(**config.sampling)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.95, 20, 0.0)
    assert (params.repetition_penalty, params.max_tokens) == (1.1, 512)
    assert (params.presence_penalty, params.frequency_penalty) == (1.5, -0.5)


def test_a_single_eos(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert load_generation_config(tmp_path).eos_ids == (2,)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"eos_token_id": "</s>"}, r"eos_token_id='</s>' must be a token id"),
        ({"temperature": "hot"}, r"temperature='hot' must be a number"),
        ({"top_k": 2.5}, r"top_k=2.5 must be an integer"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5.*Correct or remove"),
        ({"presence_penalty": 2.5}, r"presence_penalty must be in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": "a"}, r"frequency_penalty='a' must be a number"),
        ({"max_new_tokens": 0}, r"max_tokens must be at least 1"),
    ],
)
def test_values_that_cannot_be_served(raw: dict[str, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelLoadError, match=why) as caught:
        load_generation_config(tmp_path)
    assert "generation_config.json" in str(caught.value)
