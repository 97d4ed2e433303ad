"""Parameters, bytes and caches of every catalogued model, against transformers and against our own engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import ModelLoadError, StartupError
from penstock.fleet import catalogue
from penstock.fleet.architectures import ARCHITECTURES, read_facts
from penstock.fleet.facts import SCHEMES
from penstock.fleet.question import PENSTOCK_ARCHITECTURES, PENSTOCK_ENCODERS
from penstock.model.config import load_config, pooling_architectures, supported_architectures
from penstock.model.memory import kv_bytes_per_token

MODELS = list(catalogue.models())


def _transformers(config: dict[str, Any]) -> torch.nn.Module:
    """The model on the meta device: shapes without memory."""
    import transformers

    config = copy.deepcopy(config)
    config.pop("quantization_config", None)
    architecture = config["architectures"][0]
    built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, architecture)(built)
    return model


@pytest.mark.parametrize("id", MODELS)
def test_parameters_and_bytes_are_transformers(id: str) -> None:
    pytest.importorskip("transformers")
    entry = catalogue.models()[id]
    model = _transformers(entry["config"])
    facts = catalogue.find_model(id)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert facts.parameters == parameters == entry["parameters"]
    assert facts.weight_bytes(SCHEMES["none"], width=4) == sum(
        parameter.numel() * 4 for parameter in model.parameters()
    )
    assert facts.weight_bytes(SCHEMES["none"]) == 2 * parameters


@pytest.mark.parametrize("id", MODELS)
def test_the_catalogues_numbers_are_those_of_its_configs(id: str) -> None:
    """The same without transformers: as it counted, 5.23.0, with the test above."""
    assert catalogue.find_model(id).parameters == catalogue.models()[id]["parameters"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-70b", 70_553_706_496),
        ("mixtral-8x7b", 46_702_792_704),
        ("gpt-oss-20b", 20_914_757_184),
        ("bge-m3", 567_754_752),
        ("phi-2", 2_779_683_840),
    ],
)
def test_published_counts(name: str, published: int) -> None:
    """As their cards and files on the hub have them."""
    assert catalogue.find_model(name).parameters == published


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),
        ("deepseek-v3", 37.0),
        ("qwen3-30b-a3b", 3.3),
        ("qwen3-235b-a22b", 22.0),
        ("gpt-oss-20b", 3.6),
        ("gpt-oss-120b", 5.1),
    ],
)
def test_active_parameters_of_experts_are_as_published(name: str, billions: float) -> None:
    """Their authors' figures, some of which count the embedding as well."""
    facts = catalogue.find_model(name)
    with_embedding = facts.active_parameters + facts.vocab_size * facts.hidden_size
    assert facts.active_parameters / 1e9 <= billions * 1.03
    assert with_embedding / 1e9 >= billions * 0.97


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-2-7b", 524_288),
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("qwen3-32b", 262_144),
        ("deepseek-v3", 61 * (512 + 64) * 2),  # one latent for all heads
        ("bge-m3", 0),
    ],
)
def test_kv_bytes_per_token(name: str, bytes_per_token: int) -> None:
    assert catalogue.find_model(name).kv_bytes_per_token() == bytes_per_token


@pytest.mark.parametrize("id", MODELS)
def test_what_our_engine_serves_is_read_alike(id: str, tmp_path: Path) -> None:
    config = catalogue.models()[id]["config"]
    if config["architectures"][0] not in supported_architectures():
        pytest.skip("another engine's")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, facts = load_config(tmp_path), catalogue.find_model(id)
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
        assert getattr(facts, name) == getattr(ours, name)
    assert facts.context_length == ours.context_length
    assert facts.kv_bytes_per_token() == kv_bytes_per_token(ours, 2)


def test_which_architectures_are_ours() -> None:
    assert frozenset(supported_architectures()) == PENSTOCK_ARCHITECTURES
    assert frozenset(ARCHITECTURES) >= PENSTOCK_ARCHITECTURES
    theirs = frozenset(pooling_architectures()) & frozenset(ARCHITECTURES)
    assert theirs - PENSTOCK_ARCHITECTURES == PENSTOCK_ENCODERS


@pytest.mark.parametrize("id", MODELS)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_together_hold_the_model_and_little_more(id: str, tp: int) -> None:
    facts = catalogue.find_model(id)
    if facts.tp_problem(tp):
        pytest.skip("does not divide")
    whole = facts.weight_bytes(SCHEMES["none"])
    ranks = tp * facts.weight_bytes(SCHEMES["none"], tp=tp)
    replicated = sum(2 * weight.parameters for weight in facts.weights if weight.split == "whole")
    kv = sum(2 * weight.parameters for weight in facts.weights if weight.split == "kv_heads")
    again = max(0, tp // min(tp, facts.num_kv_heads) - 1)
    assert whole <= ranks <= whole + (tp - 1) * replicated + again * kv + whole // 1000


@pytest.mark.parametrize("id", MODELS)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "awq", "gptq", "mxfp4", "nvfp4"])
def test_quantised_weights_are_smaller_and_the_rest_keeps_its_type(id: str, scheme: str) -> None:
    facts = catalogue.find_model(id)
    plain = sum(2 * weight.parameters for weight in facts.weights if not weight.quantized)
    linear = sum(weight.parameters for weight in facts.weights if weight.quantized)
    size = facts.weight_bytes(SCHEMES[scheme])
    ideal = plain + linear * SCHEMES[scheme].bits / 8
    assert ideal <= size <= ideal + 0.07 * linear


def test_a_matrix_of_each_scheme() -> None:
    """1,000 outputs of 4,096 inputs, by hand."""
    sizes = {name: scheme.matrix_bytes(1000, 4096) for name, scheme in SCHEMES.items()}
    assert sizes["int8"] == 4_096_000 + 1000 * 4
    assert sizes["awq"] == 2_048_000 + 1000 * 32 * 2.5
    assert sizes["mxfp4"] == 2_048_000 + 1000 * 128
    assert sizes["nvfp4"] == 2_048_000 + 1000 * 256


def test_a_window_bounds_what_a_sequence_keeps() -> None:
    facts = catalogue.find_model("gemma-3-27b")
    full, windowed = facts.sequence_bytes(32_768, windowed=False), facts.sequence_bytes(32_768)
    # 10 of 62 layers see everything, the others 1,024 tokens
    assert full == 32_768 * facts.kv_bytes_per_token()
    assert windowed == (10 * 32_768 + 52 * 1024) * 16 * 2 * 128 * 2
    assert facts.sequence_bytes(512) == 512 * facts.kv_bytes_per_token()


def test_attention_is_counted_by_keys() -> None:
    """4 FLOP for each head's dimension and key: a multiplication and an addition for the score, and again for
    the value."""
    facts = catalogue.find_model("llama-2-7b")
    assert facts.attention_flops(100) == 4 * 32 * 4096 * 100


@pytest.mark.parametrize("name", ["Qwen3-32B", "qwen3-32b", "QWEN/QWEN3-32B", "Qwen/Qwen3-32B"])
def test_names_are_found_in_any_spelling(name: str) -> None:
    assert catalogue.find_model(name).name == "Qwen/Qwen3-32B"


def test_every_alias_leads_to_one_model() -> None:
    names = [name.lower() for id, entry in catalogue.models().items() for name in {id, *entry["aliases"]}]
    assert len(names) == len(set(names))


def test_an_unknown_model_names_its_neighbours() -> None:
    with pytest.raises(StartupError, match=r"neither a folder nor.*Did you mean Qwen/Qwen3-32B"):
        catalogue.find_model("qwen3-32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Nobody"]}, "architecture 'Nobody' is not known to the planner"),
        ({"architectures": None}, "architecture none is not known"),
        ({"hidden_size": 4097}, "hidden_size=4097: is not a multiple of num_attention_heads=32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be a positive integer"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5: does not divide"),
        ({"vocab_size": 1 << 40}, "vocab_size=.*is more than any model has"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "its factor must be a positive number"),
        ({"quantization_config": {"quant_method": "magic"}}, "method 'magic' is not known to the planner"),
    ],
)
def test_a_bad_config_is_refused_by_its_key(change: dict[str, Any], message: str) -> None:
    config = {**catalogue.models()["meta-llama/Llama-2-7b-hf"]["config"], **change}
    with pytest.raises(ModelLoadError, match=message):
        read_facts(Path("model/config.json"), config)


def test_a_folder_is_read(tmp_path: Path) -> None:
    config = catalogue.models()["Qwen/Qwen3-0.6B"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert catalogue.find_model(str(tmp_path)).parameters == 596_049_920
    with pytest.raises(ModelLoadError):
        catalogue.find_model(str(tmp_path / "missing"))
