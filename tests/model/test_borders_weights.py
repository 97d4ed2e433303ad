"""Weights counted number by number, files by name, rotations by their formulas: without a real checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.core.errors import ModelLoadError
from penstock.kernels.torch_operations import torch_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.checkpoint import find_safetensors
from penstock.model.config import load_config
from penstock.model.generation import GenerationConfig, generation_defaults, load_generation_config
from penstock.model.hub import is_local, resolve_model
from penstock.model.layers import Rotary, activation, rotary_frequencies
from penstock.model.loader import load_model
from penstock.model.model_config import RopeConfig
from penstock.model.weights import DummyWeights, SafetensorsWeights, ungroup_qkv

from .test_config import write

CPU = torch.device("cpu")
PLAIN = torch_operations(CPU, torch.float32)


def dummy(tmp_path: Path, **changes: Any) -> CausalLM:
    tmp_path.mkdir(exist_ok=True)
    write(tmp_path, **changes)
    return load_model(tmp_path, load_config(tmp_path), PLAIN, load_format="dummy")


# ---- what is counted ----


def test_parameters_and_the_bytes_that_a_step_reads(tmp_path: Path) -> None:
    """Of the embedding only a few rows, unless it is the output layer, too."""
    vocabulary, hidden, middle, layers = 128, 64, 96, 3
    layer = 4 * hidden * hidden + 3 * hidden * middle + 2 * hidden
    apart = dummy(tmp_path / "apart")
    assert apart.num_parameters == 2 * vocabulary * hidden + layers * layer + hidden
    assert apart.weight_bytes == 4 * apart.num_parameters
    assert apart.read_bytes == apart.weight_bytes - 4 * vocabulary * hidden
    tied = dummy(tmp_path / "tied", tie_word_embeddings=True)
    assert tied.num_parameters == vocabulary * hidden + layers * layer + hidden
    assert tied.read_bytes == tied.weight_bytes == 4 * tied.num_parameters
    biased = dummy(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    assert biased.num_parameters - apart.num_parameters == layers * (4 * hidden + 2 * middle + hidden)
    assert biased.weight_bytes == 4 * biased.num_parameters
    spec = apart.cache_spec(8)
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size) == (3, 4, 16, 8)


def test_random_weights_are_normal_and_differ_by_name() -> None:
    weights, again = DummyWeights(PLAIN), DummyWeights(PLAIN, seed=1)
    assert weights.tensor("a.bias", 5).tolist() == [0.0] * 5
    assert weights.tensor("a.weight", 5).tolist() == [1.0] * 5
    first, second = weights.tensor("a.weight", 300, 400), weights.tensor("b.weight", 300, 400)
    assert first.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert first.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert not torch.equal(first, second)
    assert torch.equal(first, DummyWeights(PLAIN).tensor("a.weight", 300, 400))
    assert not torch.equal(first, again.tensor("a.weight", 300, 400))
    assert not torch.equal(first[0], first[1])
    assert weights.parameters == 10 + 2 * 300 * 400
    assert weights.nbytes == 4 * weights.parameters


def test_fused_rows_are_put_in_order(tmp_path: Path) -> None:
    """[(q q k v) (q q k v)] → [q q q q | k k | v v], of two rows each."""
    config = replace(load_config(write(tmp_path)), num_heads=4, num_kv_heads=2, head_dim=2)
    names = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    rows = torch.arange(16.0)
    wanted = ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
    got = ungroup_qkv(config)(rows)
    assert got.tolist() == [2.0 * names.index(name) + half for name in wanted for half in (0, 1)]
    matrix = rows[:, None] * torch.ones(16, 3)
    assert torch.equal(ungroup_qkv(config)(matrix), got[:, None] * torch.ones(16, 3))


def stored(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def test_several_tensors_become_one_product(tmp_path: Path) -> None:
    parts = {f"{name}.weight": torch.randn(rows, 4) for name, rows in (("q", 2), ("k", 3))}
    parts |= {
        "q.bias": torch.randn(2),
        "k.bias": torch.randn(3),
        "n.weight": torch.randn(4),
        "n.bias": torch.zeros(4),
    }
    seen: list[tuple[int, int]] = []
    weights = SafetensorsWeights(stored(tmp_path, parts), PLAIN, lambda *told: seen.append(told))
    linear = weights.linear(["q", "k"], 4, [2, 3], bias=True)
    x = torch.randn(7, 4)
    whole = torch.cat([parts["q.weight"], parts["k.weight"]])
    assert torch.allclose(linear(x), x @ whole.T + torch.cat([parts["q.bias"], parts["k.bias"]]), atol=1e-5)
    assert (weights.parameters, weights.nbytes) == (25, 100)
    assert weights.has("n.bias")
    assert not weights.has("v.weight")
    norm = weights.layer_norm("n", 4, 1e-5)
    assert norm(x).shape == (7, 4)
    weights.finish(tied=False)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert [done for done, _ in seen] == [32, 80, 88, 100, 116, 132, size]
    assert {total for _, total in seen} == {size}


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (("v.weight", 2), "tensor 'v.weight' of shape [2] is missing. The checkpoint is incomplete, or"),
        (("q.weight", 3), "tensor 'q.weight' has shape [2], but config.json calls for [3]."),
        (("i.weight", 2), "tensor 'i.weight' has dtype int8, which is not supported. Supported: float32,"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, ask: tuple[str, int], said: str) -> None:
    weights = SafetensorsWeights(
        stored(tmp_path, {"q.weight": torch.ones(2), "i.weight": torch.ones(2, dtype=torch.int8)}), PLAIN
    )
    with pytest.raises(ModelLoadError) as caught:
        weights.tensor(*ask)
    assert said in str(caught.value)
    weights.close()
    weights.close()


def test_a_tensor_has_memory_of_its_own_and_a_view_may_be_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = SafetensorsWeights(stored(tmp_path, {"a": torch.ones(2), "b": torch.zeros(4)}), PLAIN)
    kept = torch.ones(2)
    monkeypatch.setattr(weights, "_read", lambda name, shape: kept)
    assert weights._take(["a"], [(2,)], view=True).data_ptr() == kept.data_ptr()
    assert weights._take(["a"], [(2,)]).data_ptr() != kept.data_ptr()
    assert weights.tensor("a", 2).data_ptr() != kept.data_ptr()
    monkeypatch.setattr(weights, "_read", lambda name, shape: kept.double())
    assert weights.tensor("a", 2).dtype == torch.float32
    assert (weights.parameters, weights.nbytes) == (8, 32)
    # what is stacked is stacked in the same memory each time, unless more is needed
    first = weights._take(["a", "b"], [(2,), (2,)], view=True)
    assert weights._take(["a", "b"], [(2,), (2,)], view=True).data_ptr() == first.data_ptr()
    assert weights._take(["a"] * 3, [(2,)] * 3, view=True).shape == (6,)
    assert weights._take(["a", "b"], [(2,), (2,)]).data_ptr() != weights._local.buffer.data_ptr()
    weights.close()


@pytest.mark.parametrize(("extra", "more"), [(3, ""), (4, " and 1 more"), (6, " and 3 more")])
def test_tensors_that_nobody_asked_for_are_named(tmp_path: Path, extra: int, more: str) -> None:
    tensors = {f"x{number}": torch.ones(1) for number in range(extra)}
    weights = SafetensorsWeights(stored(tmp_path, tensors | {"lm_head.weight": torch.ones(1)}), PLAIN)
    with pytest.raises(ModelLoadError) as caught:
        weights.finish(tied=True)
    assert f"unexpected tensors 'x0', 'x1', 'x2'{more}. The checkpoint has parts" in str(caught.value)
    alone = SafetensorsWeights(stored(tmp_path / "b", {"lm_head.weight": torch.ones(1)}), PLAIN)
    alone.finish(tied=True)
    again = SafetensorsWeights(tmp_path / "b", PLAIN)
    with pytest.raises(ModelLoadError, match=r"unexpected tensors 'lm_head\.weight'"):
        again.finish(tied=False)
    old = {"a.rotary_emb.inv_freq": torch.ones(1), "a.attention.bias": torch.ones(1)}
    SafetensorsWeights(
        stored(tmp_path / "c", old | {"a.attention.masked_bias": torch.ones(1)}), PLAIN
    ).finish(False)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["model.layers.0.a", "model.layers.2.b"], 3),
        (["transformer.h.1.a"], 2),
        (["a.b"], 0),
        (["xh.5.a"], 0),
    ],
)
def test_layers_are_counted_by_their_names(tmp_path: Path, names: Sequence[str], count: int) -> None:
    weights = SafetensorsWeights(stored(tmp_path, {name: torch.ones(1) for name in names}), PLAIN)
    weights.expect_layers(count)
    with pytest.raises(ModelLoadError, match=f"holds {count} layers, but config.json calls for {count + 1} "):
        weights.expect_layers(count + 1)
    weights.close()


# ---- files ----


def index(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def test_shards_are_those_of_the_index_each_once(tmp_path: Path) -> None:
    stored(tmp_path, {"a": torch.ones(1)}, "b.safetensors")
    stored(tmp_path, {"b": torch.ones(1)}, "a.safetensors")
    stored(tmp_path, {"c": torch.ones(1)})
    index(tmp_path, {"weight_map": {"a": "b.safetensors", "b": "a.safetensors", "c": "b.safetensors"}})
    told, files = find_safetensors(tmp_path)
    assert told == tmp_path / "model.safetensors.index.json"
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    told.unlink()
    assert find_safetensors(tmp_path) == (tmp_path / "model.safetensors",) * 1 + (
        [tmp_path / "model.safetensors"],
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "'weight_map' is missing or empty."),
        ({"weight_map": {}}, "'weight_map' is missing or empty."),
        ({"weight_map": ["a"]}, "'weight_map' is missing or empty."),
        ({"weight_map": {"a": 5}}, "weight_map names 5, which is no file name."),
        ({"weight_map": {"a": "x.bin"}}, "weight_map names 'x.bin', which is no *.safetensors file of this"),
        (
            {"weight_map": {"a": "../x.safetensors"}},
            "which is no *.safetensors file of this folder. Download",
        ),
        ({"weight_map": {"a": "/x.safetensors"}}, "which is no *.safetensors file"),
        ({"weight_map": {"a": "./x.safetensors"}}, "which is no *.safetensors file"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "which is no *.safetensors file"),
        (
            {"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors"}},
            "y.safetensors is missing: model.safetensors.index.json lists 3 shards, 2 not there. Download",
        ),
    ],
)
def test_an_index_that_cannot_be(tmp_path: Path, content: Any, said: str) -> None:
    stored(tmp_path, {"a": torch.ones(1)}, "x.safetensors")
    with pytest.raises(ModelLoadError) as caught:
        find_safetensors(index(tmp_path, content))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "has no weights: there is no *.safetensors file."),
        (("training_args.bin", "a.txt"), "has no weights: there is no *.safetensors file."),
        (("b.gguf", "a.bin"), "has weights only as a.bin, b.gguf. Only safetensors are loaded: convert"),
        (("a.pt", "b.pth", "c.h5", "d.msgpack"), "has weights only as a.pt, b.pth, c.h5."),
        (
            ("d.safetensors", "a.safetensors", "b.safetensors", "c.safetensors", "x.bin"),
            "holds a.safetensors, b.safetensors, c.safetensors but neither model.safetensors nor",
        ),
    ],
)
def test_a_folder_without_weights_says_what_there_is(tmp_path: Path, names: Sequence[str], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ModelLoadError) as caught:
        find_safetensors(tmp_path)
    assert said in str(caught.value)
    with pytest.raises(ModelLoadError, match="cannot be read: No such file or directory"):
        find_safetensors(tmp_path / "nowhere")


# ---- names ----


def test_what_is_here_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert [is_local(name) for name in ("demo", "penstock/demo", str(tmp_path), "~/m")] == [True] * 4
    assert [is_local(name) for name in ("", "owner/name", "~/n", "Demo")] == [False] * 4
    assert resolve_model("~/m") == tmp_path / "m"
    with pytest.raises(
        ModelLoadError, match=r"--revision v1 cannot apply to the local model ~/m\."
    ) as caught:
        resolve_model("~/m", "v1")
    assert caught.value.advice == "It selects a revision of a Hugging Face id."
    with pytest.raises(ModelLoadError, match="--revision v1 cannot apply to the local model demo"):
        resolve_model("demo", "v1")


# ---- defaults of sampling ----


def generation(tmp_path: Path, **raw: Any) -> GenerationConfig:
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    return load_generation_config(tmp_path)


def test_defaults_of_sampling_are_taken_over_by_name(tmp_path: Path) -> None:
    values = {"temperature": 0, "top_p": 1, "top_k": 5, "min_p": 0.5, "repetition_penalty": 2}
    found = generation(tmp_path, **values, max_new_tokens=7, other="x")
    assert found.sampling == {**values, "max_tokens": 7}
    assert found.eos_ids == ()
    for given, ids in ((None, ()), (0, (0,)), ([1, 2], (1, 2)), ([], ())):
        assert generation(tmp_path, eos_token_id=given).eos_ids == ids


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"eos_token_id": -1}, "eos_token_id=-1 must be a token id or a list of them."),
        ({"eos_token_id": [1, True]}, "must be a token id or a list of them."),
        ({"eos_token_id": [1.0]}, "must be a token id"),
        ({"eos_token_id": 1 << 31}, "must be a token id"),
        ({"top_k": 1 << 31}, "top_k=2147483648 must be an integer of 32 bits."),
        ({"top_k": -(1 << 31)}, "must be an integer of 32 bits."),
        ({"top_k": 5.0}, "top_k=5.0 must be an integer of 32 bits."),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be an integer of 32 bits."),
        ({"temperature": True}, "temperature=True must be a number."),
        ({"min_p": "x"}, "min_p='x' must be a number."),
        ({"temperature": -1}, "Correct or remove the value."),
    ],
)
def test_defaults_that_cannot_be_served(tmp_path: Path, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        generation(tmp_path, **raw)
    assert said in str(caught.value)


def test_where_defaults_come_from(tmp_path: Path) -> None:
    own, other, none = (tmp_path / name for name in ("own", "other", "none"))
    for folder in (own, other, none):
        folder.mkdir()
    found = generation(own, eos_token_id=5, top_k=7)
    elsewhere = generation(other, eos_token_id=6, top_k=8)
    assert generation_defaults("auto", own) == found
    assert generation_defaults("auto", none) == GenerationConfig()
    assert generation_defaults("vllm", own) == GenerationConfig((5,))
    assert generation_defaults(str(other), own) == elsewhere
    with pytest.raises(ModelLoadError, match=r"there is no generation_config\.json in it") as caught:
        generation_defaults(str(none), own)
    assert caught.value.param == "--generation-config"
    assert caught.value.advice == "Use auto, vllm, or a directory that holds one."


# ---- rotations ----


def yarn_by_hand(scaling: dict[str, Any], dim: int, theta: float, positions: int) -> list[float]:
    """arXiv 2309.00071, as transformers has it."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or positions

    def place(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.get("beta_fast", 32)), place(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    found = []
    for i in range(dim // 2):
        ramp = min(1.0, max(0.0, (i - low) / (high - low)))
        frequency = theta ** (-2 * i / dim)
        found.append(frequency / factor * ramp + frequency * (1 - ramp))
    return found


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 4.0},
        {"factor": 4.0, "original_max_position_embeddings": 128},
        {"factor": 4.0, "beta_fast": 16, "beta_slow": 2},
        {"factor": 4.0, "truncate": False},
        {"factor": 4.0, "beta_fast": 1000, "beta_slow": 1e-6},
        {"factor": 4.0, "beta_fast": 2, "beta_slow": 2, "truncate": False},
    ],
)
def test_yarn_is_its_formula(scaling: dict[str, Any]) -> None:
    rope = RopeConfig(500.0, "yarn", scaling)
    frequencies, factor = rotary_frequencies(rope, 16, 2048)
    assert frequencies.tolist() == pytest.approx(yarn_by_hand(scaling, 16, 500.0, 2048), rel=1e-5)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"factor": 8.0}, 0.1 * math.log(8) + 1),
        ({"factor": 8.0, "attention_factor": 3.0}, 3.0),
        ({"factor": 8.0, "mscale": 2.0}, 0.1 * math.log(8) + 1),
        ({"factor": 8.0, "mscale_all_dim": 2.0}, 0.1 * math.log(8) + 1),
        (
            {"factor": 8.0, "mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(8) + 1) / (0.05 * math.log(8) + 1),
        ),
    ],
)
def test_yarn_scales_attention(scaling: dict[str, Any], factor: float) -> None:
    assert rotary_frequencies(RopeConfig(500.0, "yarn", scaling), 16, 2048)[1] == pytest.approx(factor)


def test_other_types_are_their_formulas() -> None:
    plain = [500.0 ** (-2 * i / 8) for i in range(4)]
    frequencies, factor = rotary_frequencies(RopeConfig(500.0), 8, 64)
    assert frequencies.tolist() == pytest.approx(plain)
    assert factor == 1.0
    linear, factor = rotary_frequencies(RopeConfig(500.0, "linear", {"factor": 4.0}), 8, 64)
    assert linear.tolist() == pytest.approx([each / 4 for each in plain])
    assert factor == 1.0
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    found, factor = rotary_frequencies(RopeConfig(500.0, "llama3", scaling), 8, 64)
    wanted = []
    for each in plain:
        wavelength = 2 * math.pi / each
        if wavelength < 64 / 4.0:
            wanted.append(each)
        elif wavelength > 64 / 1.0:
            wanted.append(each / 8)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            wanted.append((1 - smooth) * each / 8 + smooth * each)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert factor == 1.0


def test_both_halves_of_a_head_have_the_same_angles(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}
    rotary = Rotary(load_config(write(tmp_path, rope_parameters=rope, head_dim=4)), CPU)
    cos, sin = rotary(torch.tensor([0, 3]), torch.float32)
    assert cos.shape == sin.shape == (2, 1, 4)
    assert cos[0, 0].tolist() == [0.5] * 4
    assert sin[0, 0].abs().tolist() == [0.0] * 4
    assert cos[1, 0, :2].tolist() == cos[1, 0, 2:].tolist()
    assert sin[1, 0, :2].tolist() == (-sin[1, 0, 2:]).tolist()
    assert sin[1, 0, 2].item() > 0
    assert (cos[1] ** 2 + sin[1] ** 2).flatten().tolist() == pytest.approx([0.25] * 4)
    assert rotary(torch.tensor([1]), torch.bfloat16)[0].dtype == torch.bfloat16


def test_activations_by_their_names(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    for name, kind in (
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
    ):
        assert activation(replace(config, activation=name)) == kind
    with pytest.raises(
        ModelLoadError, match=r"activation 'tanh' is not supported\. Supported: silu, swish, gelu"
    ):
        activation(replace(config, activation="tanh"))
