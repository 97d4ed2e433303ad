"""config.json in all its spellings, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import ModelLoadError
from penstock.model.config import load_config, supported_architectures
from tests.model.checkpoints import make_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
}


def write(directory: Path, **changes: Any) -> Path:
    """LLAMA with changes; None removes a key."""
    raw = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_fields(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, num_key_value_heads=2, rope_theta=5e5))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 16)
    assert (config.rope.theta, config.rope.type, config.rotary_dim) == (5e5, "default", 16)
    assert config.windows == (None, None, None)
    assert (config.eos_ids, config.bos_id, config.dtype) == ((2, 3), 1, "bfloat16")
    assert config.context_length == 1024
    assert config.norm_eps == 1e-5
    assert not config.tie_word_embeddings
    assert config.raw["vocab_size"] == 128


def test_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, torch_dtype=None, eos_token_id=None, bos_token_id=None))
    assert (config.dtype, config.eos_ids, config.bos_id) == ("float32", (), None)
    assert (config.num_kv_heads, config.rope.theta) == (4, 10000.0)


@pytest.mark.parametrize(
    "arch", ["llama-rope3", "llama-yarn", "llama-linear", "phi", "gpt-neox", "qwen2-window", "falcon-new"]
)
def test_transformers_4_and_5_spell_it_differently(arch: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, arch)
    new = load_config(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)
    rope = raw.pop("rope_parameters")
    neox = arch == "gpt-neox"
    raw["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        raw["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope["type"] = rope.pop("rope_type")
    raw["rope_scaling"] = rope if rope["type"] != "default" else None
    path.write_text(json.dumps(raw))
    old = load_config(tmp_path)
    assert replace(old, raw={}) == replace(new, raw={})
    assert old.raw != new.raw


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"type": "yarn", "factor": 4.0}, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1024),
    ],
)
def test_context_length(rope: dict[str, Any] | None, length: int, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, rope_scaling=rope)).context_length == length


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not supported.*LlamaForCausalLM"),
        ({"architectures": None}, r"'architectures' is missing.*Qwen3ForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config.*'gptq'.*bfloat16"),
        ({"hidden_size": None}, r"'hidden_size' is missing"),
        ({"hidden_size": "64"}, r"hidden_size='64': must be a positive integer"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: must be a positive integer"),
        ({"hidden_size": 66}, r"hidden_size=66: is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, r"4 attention heads cannot share 3 KV heads"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps=-1: must be a positive number"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes': must be true or false"),
        ({"torch_dtype": "float64"}, r"torch_dtype='float64': is not supported.*float32"),
        ({"eos_token_id": "</s>"}, r"eos_token_id='</s>': must be a token id"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"'dynamic' is not supported.*default, linear",
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor=None must be a positive number"),
        ({"rope_scaling": "linear"}, r"rope_scaling='linear': must be an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"rope_theta must be a positive number"),
    ],
)
def test_refusals_name_file_and_key(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_config(write(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)
    caught.match(why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architectures": ["FalconForCausalLM"], "alibi": True}, "alibi=True: ALiBi"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["x"]},
            "layer_types",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers=-1",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]},
            "alternating",
        ),
        ({"architectures": ["PhiForCausalLM"], "partial_rotary_factor": 1.5}, r"must be in \(0, 1\]"),
    ],
)
def test_refusals_of_single_architectures(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=why):
        load_config(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "does not exist.*config.json"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "a list"),
    ],
)
def test_files_that_are_no_config(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=why) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_the_first_supported_architecture_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        architectures=["SomethingElse", "MistralForCausalLM"],
        sliding_window=100,
        num_key_value_heads=2,
    )
    config = load_config(tmp_path)
    assert config.architecture == "MistralForCausalLM"
    assert config.windows == (100, 100, 100)
    assert config.architecture in supported_architectures()


def test_no_torch_where_the_api_process_looks() -> None:
    code = (
        "import sys; from penstock.model import config, generation, hub, memory;"
        "print([m for m in ('torch', 'numpy', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
