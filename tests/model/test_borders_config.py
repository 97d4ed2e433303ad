"""config.json at the borders of what each key may be, and each architecture's defaults."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import ModelLoadError
from penstock.model.config import load_config, model_class, supported_architectures
from penstock.model.model_config import ModelConfig

from .test_config import LLAMA, write


def refused(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_config(write(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/config.json: ", "")


def small(tmp_path: Path, architecture: str, **changes: Any) -> ModelConfig:
    return load_config(write(tmp_path, architectures=[architecture], **changes))


# ---- numbers ----


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("vocab_size", 1 << 24),
        ("intermediate_size", 1 << 22),
        ("num_hidden_layers", 4096),
        ("max_position_embeddings", (1 << 31) - 1),
        ("head_dim", 1 << 14),
    ],
)
def test_a_size_is_at_most_what_any_model_has(tmp_path: Path, key: str, most: int) -> None:
    for value in (1 if key != "head_dim" else 2, most):
        load_config(write(tmp_path, **{key: value}, bos_token_id=None, eos_token_id=None))
    said = refused(tmp_path, **{key: most + 1})
    assert said == f"{key}={most + 1}: is more than any model has; at most {most:,} can be served."
    for value in (0, -1, True, 1.0, "1", [1]):
        assert "must be a positive integer" in refused(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "most"),
    [("hidden_size", 1 << 20), ("num_attention_heads", 1 << 14), ("num_key_value_heads", 1 << 14)],
)
def test_a_size_that_others_depend_on_is_bounded_too(tmp_path: Path, key: str, most: int) -> None:
    fields = {"hidden_size": 1 << 20, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14}
    config = load_config(write(tmp_path, **fields))
    assert (config.head_dim, config.num_kv_heads) == (64, 1 << 14)
    assert f"at most {most:,} can be served" in refused(tmp_path, **fields | {key: most + 1})


def test_falcons_own_keys_are_bounded_as_well(tmp_path: Path) -> None:
    for key, most in (("n_embed", 1 << 20), ("ffn_hidden_size", 1 << 22), ("num_kv_heads", 1 << 14)):
        said = refused(
            tmp_path,
            architectures=["FalconForCausalLM"],
            new_decoder_architecture=True,
            **{key: most + 1},
        )
        assert f"{key}={most + 1}: is more than any model has; at most {most:,}" in said
    for key, instead, most in (
        ("n_layer", "num_hidden_layers", 4096),
        ("n_head", "num_attention_heads", 1 << 14),
    ):
        said = refused(tmp_path, architectures=["FalconForCausalLM"], **{instead: None, key: most + 1})
        assert f"at most {most:,}" in said


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (1.0, ""),
        (1, ""),
        (1e-12, ""),
        (1.0001, "must be at most 1"),
        (0, "must be a positive number"),
        (-1e-6, "must be a positive number"),
        (True, "must be a positive number"),
        ("1e-6", "must be a positive number"),
        (float("nan"), "must be a positive number"),
        (float("inf"), "must be a positive number"),
        (10**400, "must be a positive number"),
    ],
)
def test_what_a_norm_adds(tmp_path: Path, value: Any, why: str) -> None:
    if why:
        assert why in refused(tmp_path, rms_norm_eps=value)
    else:
        assert load_config(write(tmp_path, rms_norm_eps=value)).norm_eps == value


def test_flags_and_texts_are_what_they_are_called(tmp_path: Path) -> None:
    assert refused(tmp_path, attention_bias=1) == "attention_bias=1: must be true or false."
    assert refused(tmp_path, mlp_bias="no") == "mlp_bias='no': must be true or false."
    assert refused(tmp_path, hidden_act=["silu"]) == "hidden_act=['silu']: must be a string."
    assert refused(tmp_path, torch_dtype=16) == "torch_dtype=16: must be a string."
    assert load_config(write(tmp_path, torch_dtype="torch.float16")).dtype == "float16"
    assert load_config(write(tmp_path, dtype="float16")).dtype == "float16"
    assert load_config(write(tmp_path, hidden_act="gelu")).activation == "gelu"


# ---- token ids ----


def test_ids_that_the_model_cannot_sample_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "penstock.engine"):
        config = load_config(write(tmp_path, eos_token_id=[0, 127], bos_token_id=0))
        assert (config.eos_ids, config.bos_id) == ((0, 127), 0)
        assert caplog.messages == []
        config = load_config(write(tmp_path, eos_token_id=[-1, 5, 128], bos_token_id=128))
    assert (config.eos_ids, config.bos_id) == ((5,), None)
    where = f"{tmp_path}/config.json"
    assert caplog.messages == [
        f"{where}: eos_token_id: token id -1 is outside of the vocabulary of 128, and ignored",
        f"{where}: bos_token_id: token id 128 is outside of the vocabulary of 128, and ignored",
    ]
    for wrong in ([True], [1.0], ["a"], {"a": 1}, False):
        assert "must be a token id or a list of them" in refused(tmp_path, eos_token_id=wrong)


# ---- heads ----


def test_heads_share_evenly(tmp_path: Path) -> None:
    for heads, kv in ((4, 1), (4, 2), (4, 4)):
        config = load_config(write(tmp_path, num_attention_heads=heads, num_key_value_heads=kv))
        assert (config.num_heads, config.num_kv_heads) == (heads, kv)
    assert "4 attention heads cannot share 8 KV heads evenly" in refused(tmp_path, num_key_value_heads=8)
    # a head that is given need not be the hidden size's share
    assert load_config(write(tmp_path, hidden_size=66, head_dim=10)).head_dim == 10


def test_a_head_has_room_for_a_pair(tmp_path: Path) -> None:
    phi: dict[str, Any] = {"architectures": ["PhiForCausalLM"]}
    assert load_config(write(tmp_path, **phi, partial_rotary_factor=1.0)).rotary_dim == 16
    assert load_config(write(tmp_path, **phi, head_dim=4, partial_rotary_factor=0.5)).rotary_dim == 2
    assert load_config(write(tmp_path, **phi, head_dim=4, partial_rotary_factor=0.25)).rotary_dim == 1
    assert load_config(write(tmp_path, head_dim=2)).rotary_dim == 2
    assert load_config(write(tmp_path, head_dim=16)).rotary_dim == 16
    said = refused(tmp_path, **phi, head_dim=4, partial_rotary_factor=0.2)
    assert said == "head_dim=4, of which 0.2 is rotated, has no room for a pair of dimensions."
    for odd in (1, 3, 17):  # all of an odd head cannot be turned in pairs
        assert f"head_dim={odd}, of which 1 is rotated" in refused(tmp_path, head_dim=odd)


# ---- rope ----


@pytest.mark.parametrize(
    ("theta", "fine"),
    [
        (1.0001, True),
        (1e15, True),
        (500000, True),
        (1, False),
        (1.1e15, False),
        (True, False),
        ("7", False),
        ([7], False),
    ],
)
def test_bases_of_wavelengths(tmp_path: Path, theta: Any, fine: bool) -> None:
    if fine:
        assert load_config(write(tmp_path, rope_theta=theta)).rope.theta == theta
        assert load_config(write(tmp_path, rope_parameters={"rope_theta": theta})).rope.theta == theta
        return
    assert "rope_theta" in refused(tmp_path, rope_theta=theta)
    said = refused(tmp_path, rope_parameters={"rope_theta": theta})
    assert said.startswith("rope_parameters={")
    assert "rope_theta must be a positive number over 1, at most 1e+15" in said


@pytest.mark.parametrize(("share", "fine"), [(1, True), (0.5, True), (0, False), (1.01, False), ("1", False)])
def test_shares_that_are_rotated(tmp_path: Path, share: Any, fine: bool) -> None:
    given = {"architectures": ["PhiForCausalLM"], "rope_parameters": {"partial_rotary_factor": share}}
    if fine:
        assert load_config(write(tmp_path, **given)).rope.partial_factor == share
    else:
        assert "partial_rotary_factor" in refused(tmp_path, **given)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
def test_numbers_of_a_rope_type_are_needed(tmp_path: Path, key: str) -> None:
    for wrong in (None, 0, 1e7, True, "8", float("nan")):
        scaling = {**LLAMA3, key: wrong}
        said = refused(tmp_path, rope_scaling=scaling)
        assert f"rope_scaling.{key}=" in said
        assert "must be a positive number for rope type 'llama3', from 1e-06 to 1e+06." in said


@pytest.mark.parametrize(
    ("key", "fine", "wrong"),
    [
        ("beta_fast", [1e-6, 1e6], [0, 2e6]),
        ("beta_slow", [1e-6, 1e6], [0, 2e6]),
        ("mscale", [0, 1e6], [-1, 2e6]),
        ("mscale_all_dim", [0, 1e6], [-1, 2e6]),
        ("attention_factor", [1e-6, 1e6], [0, 2e6]),
        ("original_max_position_embeddings", [1, 1 << 20], [0, 1 << 31]),
    ],
)
def test_numbers_that_a_rope_type_may_have(
    tmp_path: Path, key: str, fine: list[Any], wrong: list[Any]
) -> None:
    for value in fine:
        assert load_config(write(tmp_path, rope_scaling={**YARN, key: value})).rope.scaling[key] == value
    for value in wrong:
        assert f"rope_scaling.{key}=" in refused(tmp_path, rope_scaling={**YARN, key: value})


def test_the_low_frequency_is_below_the_high_one(tmp_path: Path) -> None:
    load_config(write(tmp_path, rope_scaling={**LLAMA3, "low_freq_factor": 3.9}))
    for low in (4.0, 5.0):
        said = refused(tmp_path, rope_scaling={**LLAMA3, "low_freq_factor": low})
        assert "low_freq_factor must be below high_freq_factor" in said
    assert "truncate must be true or false" in refused(tmp_path, rope_scaling={**YARN, "truncate": 1})
    assert (
        load_config(write(tmp_path, rope_scaling={**YARN, "truncate": False})).rope.scaling["truncate"]
        is False
    )


def test_what_was_trained_is_the_models_length_where_nothing_else_is_said(tmp_path: Path) -> None:
    for scaling in (LLAMA3, YARN):
        rope = load_config(write(tmp_path, rope_scaling=scaling)).rope
        assert rope.scaling["original_max_position_embeddings"] == 1024
        given = {**scaling, "original_max_position_embeddings": 64}
        rope = load_config(write(tmp_path, rope_scaling=given)).rope
        assert rope.scaling["original_max_position_embeddings"] == 64
    plain = {"rope_type": "linear", "factor": 2.0}
    assert (
        "original_max_position_embeddings"
        not in load_config(write(tmp_path, rope_scaling=plain)).rope.scaling
    )


def test_of_two_spellings_the_newer_counts_and_none_is_left_in_it(tmp_path: Path) -> None:
    rope = load_config(
        write(
            tmp_path,
            rope_parameters={"rope_type": "linear", "type": "yarn", "factor": 2.0, "rope_theta": 7.0},
            rope_scaling={"type": "nonsense"},
            rope_theta=9.0,
        )
    ).rope
    assert (rope.type, rope.theta, rope.scaling) == ("linear", 7.0, {"factor": 2.0})
    rope = load_config(write(tmp_path, rope_scaling={"type": "default", "factor": 2.0})).rope
    assert (rope.type, rope.scaling) == ("default", {})
    for kind in (5, ["linear"], "Linear"):
        said = refused(tmp_path, rope_scaling={"type": kind, "factor": 2.0})
        assert "is not supported. Supported rope types: default, linear, llama3, yarn." in said


@pytest.mark.parametrize(
    ("scaling", "positions", "length"),
    [
        ({"type": "linear", "factor": 2.5}, 1000, 2500),
        ({"type": "linear", "factor": 1e-3}, 1000, 1),
        ({**YARN, "original_max_position_embeddings": 100}, 1000, 1000),
        ({**YARN, "original_max_position_embeddings": 300}, 1000, 1200),
        (YARN, (1 << 29) - 1, (1 << 31) - 4),
        (LLAMA3, 1000, 1000),
    ],
)
def test_contexts(tmp_path: Path, scaling: dict[str, Any], positions: int, length: int) -> None:
    config = load_config(write(tmp_path, rope_scaling=scaling, max_position_embeddings=positions))
    assert config.context_length == length


def test_a_context_is_counted_in_32_bits_and_has_a_token(tmp_path: Path) -> None:
    said = refused(tmp_path, rope_scaling=YARN, max_position_embeddings=1 << 29)
    assert "max_position_embeddings=536870912 times the rope factor makes a context of 2147483648" in said
    said = refused(tmp_path, rope_scaling={"type": "linear", "factor": 1e-6})
    assert "makes a context of 0 tokens" in said


# ---- architectures ----


def test_every_architecture_has_its_class() -> None:
    assert {name: model_class(name) for name in supported_architectures()} == {
        "FalconForCausalLM": ("penstock.model.falcon", "FalconForCausalLM"),
        "GPTNeoXForCausalLM": ("penstock.model.gpt_neox", "GPTNeoXForCausalLM"),
        "LlamaForCausalLM": ("penstock.model.llama", "LlamaForCausalLM"),
        "MistralForCausalLM": ("penstock.model.llama", "LlamaForCausalLM"),
        "PhiForCausalLM": ("penstock.model.phi", "PhiForCausalLM"),
        "Qwen2ForCausalLM": ("penstock.model.llama", "LlamaForCausalLM"),
        "Qwen3ForCausalLM": ("penstock.model.qwen3", "Qwen3ForCausalLM"),
    }


#: architecture → what transformers' configuration classes say where config.json says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"norm_eps": 1e-6, "activation": "silu", "num_kv_heads": 4, "head_dim": 16},
    "MistralForCausalLM": {"norm_eps": 1e-6, "activation": "silu", "num_kv_heads": 8},
    "Qwen2ForCausalLM": {"norm_eps": 1e-6, "activation": "silu", "attention_bias": True},
    "Qwen3ForCausalLM": {"norm_eps": 1e-6, "activation": "silu", "head_dim": 128},
    "PhiForCausalLM": {
        "norm_eps": 1e-5,
        "activation": "gelu_new",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "rotary_dim": 8,
    },
    "GPTNeoXForCausalLM": {
        "norm_eps": 1e-5,
        "activation": "gelu",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "rotary_dim": 4,
    },
    "FalconForCausalLM": {
        "norm_eps": 1e-5,
        "activation": "gelu",
        "num_kv_heads": 1,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_config_json_leaves_open(tmp_path: Path, name: str) -> None:
    heads = 16 if name == "MistralForCausalLM" else 4
    config = small(
        tmp_path,
        name,
        rms_norm_eps=None,
        num_attention_heads=heads,
        hidden_size=64 * heads // 4,
        max_position_embeddings=None,
    )
    plain = {"attention_bias": False, "output_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    wanted = {**plain, "max_position_embeddings": 2048, "windows": (None,) * 3, **DEFAULTS[name]}
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.rope.theta == 10000.0
    assert config.architecture == name


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, {"attention_bias": True, "output_bias": True}),
        ("LlamaForCausalLM", {"mlp_bias": True}, {"mlp_bias": True, "attention_bias": False}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ("MistralForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True}, {"num_kv_heads": 2}),
        ("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 9}, {"windows": (9, 9, 9)}),
        ("MistralForCausalLM", {"num_key_value_heads": 2, "hidden_act": "gelu"}, {"activation": "gelu"}),
        ("MistralForCausalLM", {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("LlamaForCausalLM", {"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("Qwen2ForCausalLM", {"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("Qwen3ForCausalLM", {"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("PhiForCausalLM", {"layer_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("GPTNeoXForCausalLM", {"layer_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ("GPTNeoXForCausalLM", {"max_position_embeddings": 77}, {"max_position_embeddings": 77}),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),
        ("Qwen3ForCausalLM", {"attention_bias": True}, {"attention_bias": True, "output_bias": True}),
        ("Qwen3ForCausalLM", {"head_dim": 32}, {"head_dim": 32, "mlp_bias": False}),
        ("GPTNeoXForCausalLM", {"attention_bias": False}, {"attention_bias": False, "output_bias": False}),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.5, "rotary_emb_base": 99}, {"rotary_dim": 8}),
        ("GPTNeoXForCausalLM", {"num_key_value_heads": 2}, {"num_kv_heads": 4}),
        (
            "FalconForCausalLM",
            {"bias": True},
            {"attention_bias": True, "output_bias": True, "mlp_bias": True},
        ),
        ("FalconForCausalLM", {"multi_query": False}, {"num_kv_heads": 4}),
        ("FalconForCausalLM", {"new_decoder_architecture": True}, {"num_kv_heads": 4}),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, {"num_kv_heads": 2}),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "n_head_kv": 2}, {"num_kv_heads": 2}),
        ("FalconForCausalLM", {"ffn_hidden_size": 99}, {"intermediate_size": 99}),
        ("FalconForCausalLM", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ("FalconForCausalLM", {"n_embed": 128}, {"hidden_size": 128, "intermediate_size": 512}),
        ("FalconForCausalLM", {"hidden_size": None, "n_embed": 128}, {"hidden_size": 128}),
        ("FalconForCausalLM", {"num_attention_heads": None, "n_head": 2}, {"num_heads": 2, "head_dim": 32}),
        ("FalconForCausalLM", {"num_hidden_layers": None, "n_layer": 5}, {"num_layers": 5}),
    ],
)
def test_what_config_json_says(
    tmp_path: Path, name: str, changes: dict[str, Any], wanted: dict[str, Any]
) -> None:
    config = small(tmp_path, name, **changes)
    assert {key: getattr(config, key) for key in wanted} == wanted
    if "rotary_emb_base" in changes:
        assert config.rope.theta == 99


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 9}, (None, None, None)),
        ({"use_sliding_window": True}, (None, None, None)),  # from layer 28 on
        ({"use_sliding_window": True, "num_hidden_layers": 30}, (None,) * 28 + (4096,) * 2),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9}, (9, 9, 9)),
        ({"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 9}, (None, None, 9)),
        ({"use_sliding_window": True, "max_window_layers": 3}, (None, None, None)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (None, 9, None),
        ),
    ],
)
def test_windows_of_layers(
    tmp_path: Path, name: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert small(tmp_path, name, **changes).windows == windows


@pytest.mark.parametrize(
    "types", ["full_attention", ["full_attention"] * 2, ["full_attention"] * 4, [1, 2, 3]]
)
def test_layer_types_are_one_for_each_layer(tmp_path: Path, types: Any) -> None:
    said = refused(tmp_path, architectures=["Qwen2ForCausalLM"], use_sliding_window=True, layer_types=types)
    assert "must say full_attention or sliding_attention for each layer" in said


@pytest.mark.parametrize("value", [True, 1.5, "2"])
def test_the_first_layer_with_a_window_is_a_number(tmp_path: Path, value: Any) -> None:
    said = refused(
        tmp_path, architectures=["Qwen3ForCausalLM"], use_sliding_window=True, max_window_layers=value
    )
    assert "must be an integer of at least 0" in said


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("PhiForCausalLM", "qk_layernorm"),
        ("GPTNeoXForCausalLM", "use_parallel_residual"),
        ("GPTNeoXForCausalLM", "attention_bias"),
        ("FalconForCausalLM", "parallel_attn"),
        ("FalconForCausalLM", "new_decoder_architecture"),
        ("FalconForCausalLM", "multi_query"),
        ("FalconForCausalLM", "bias"),
        ("FalconForCausalLM", "alibi"),
        ("Qwen2ForCausalLM", "use_sliding_window"),
    ],
)
def test_what_an_architecture_reads_itself_is_checked_first(tmp_path: Path, name: str, flag: str) -> None:
    assert refused(tmp_path, architectures=[name], **{flag: "yes"}) == f"{flag}='yes': must be true or false."


def test_falcons_norms_are_a_number(tmp_path: Path) -> None:
    said = refused(tmp_path, architectures=["FalconForCausalLM"], num_ln_in_parallel_attn="two")
    assert said == "num_ln_in_parallel_attn='two': must be a positive integer."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": []}, "'architectures' is missing. Supported architectures: FalconForCausalLM, "),
        ({"architectures": "LlamaForCausalLM"}, "'architectures' is missing."),
        ({"architectures": [5, "X", "Y", "Z"]}, "architecture 5, 'X', 'Y' is not supported. Supported"),
        ({"quantization_config": "awq"}, "quantised checkpoints (here 'awq') are not supported. Use the"),
        ({"quantization_config": {}}, "quantised checkpoints (here None)"),
    ],
)
def test_what_is_no_model_of_ours(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, **changes)


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, something=[1]))
    assert config.raw == json.loads((tmp_path / "config.json").read_text()) == {**LLAMA, "something": [1]}
    assert config.path == tmp_path / "config.json"
    assert "something" not in repr(config)
