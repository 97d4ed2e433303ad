"""Memory: known answers, by hand, and our own engine's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from penstock.engine.config import EngineConfig
from penstock.engine.preview import preview
from penstock.fleet import catalogue
from penstock.fleet.architectures import read_facts
from penstock.fleet.candidates import candidates, consider
from penstock.fleet.documents import claims, weights_gb
from penstock.fleet.facts import SCHEMES
from penstock.fleet.hardware import GB, GIB
from penstock.fleet.roofline import Machine, fitted
from penstock.fleet.sizing import loaded, room, sequences_of
from penstock.kernels.create import create_operations
from penstock.model.config import load_config
from penstock.model.hub import resolve_model
from penstock.model.loader import load_model
from penstock.model.memory import activation_bytes, plan_memory
from tests.fleet.asking import ask


def machine(model: str, gpu: str, tp: int = 1, scheme: str = "none", width: int = 2) -> Machine:
    return Machine(
        catalogue.find_model(model),
        catalogue.find_device(gpu),
        tp,
        SCHEMES[scheme],
        width,
        width,
        fitted().efficiency,
    )


@pytest.mark.parametrize(
    ("model", "scheme", "tp", "said"),
    [
        ("llama-2-7b", "none", 1, 14.0),  # S8
        ("llama-2-70b", "none", 1, 140.0),  # S8
        ("llama-2-70b", "none", 4, 35.0),  # S10
        ("llama-2-70b", "none", 8, 17.5),  # S10
        ("qwen3-vl-8b", "none", 1, 16.0),  # S7
        ("qwen3-32b", "none", 1, 64.0),  # S7
        ("qwen3-32b", "int8", 1, 32.0),  # S7
    ],
)
def test_the_rules_of_thumb_that_hold(model: str, scheme: str, tp: int, said: float) -> None:
    assert weights_gb(model, scheme, tp) == pytest.approx(said, rel=0.1)


def test_a_70b_takes_more_than_140_gb_with_llama_3s_vocabulary_and_less_with_llama_2s() -> None:
    assert weights_gb("llama-3-70b") == pytest.approx(141.107, abs=0.001)
    assert weights_gb("llama-2-70b") == pytest.approx(137.953, abs=0.001)


def test_ranks_that_fit_what_the_documents_say() -> None:
    """S10: four ranks on A100-40GB, eight on V100-32GB; S9: not two of 40 GB at 16 bits or 8, but at 4."""
    found = {
        (each.device.name, each.tp): each.ok
        for each in candidates(ask("llama-2-70b", "A100-40GB", "V100-32GB", rate=0.01, targets={}))
    }
    assert found["A100-40GB", 4]
    assert found["V100-32GB", 8]
    assert not found["A100-40GB", 2]
    one, device = (
        ask("llama-3-70b", "A100-40GB", rate=0.01, targets={}),
        catalogue.find_device("A100-40GB"),
    )
    assert consider(one, device, 2, SCHEMES["awq"]).ok
    assert not consider(one, device, 2, SCHEMES["int8"]).ok


def test_a_32b_in_a_slice_of_40_gb() -> None:
    """T19: about 15k tokens with the documents' assumptions, which are 40 decimal GB, 0.90, 32 GB of
    weights and nothing else; less with what is really there."""
    facts = catalogue.find_model("qwen3-32b")
    assert facts.kv_bytes_per_token() == 262_144
    assert (0.90 * 40 * GB - 32 * GB) / facts.kv_bytes_per_token() == pytest.approx(15_259, abs=1)
    device = catalogue.find_device("A100-80GB")
    profile = device.profile("3g.40gb")
    assert profile is not None
    assert profile.memory == int(39.25 * GIB)
    found = {claim.what: claim for claim in claims()}
    truth = found["the same, with what really takes memory"]
    assert 5_000 < truth.value < 9_000
    assert truth.verdict == "wrong"


def test_the_table_is_the_sum_of_its_lines() -> None:
    space = room(
        machine("llama-3.1-8b", "A100-80GB"),
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=8192,
    )
    assert space.limit == int(80 * GIB * 0.92)
    assert space.weights + space.step + space.runtime + space.kv_cache == space.limit
    assert space.weights == 16_060_522_496
    assert space.tokens == space.kv_cache // (131_072 * 16) * 16
    assert space.fits
    assert space.missing == 0


def test_what_is_missing_is_told() -> None:
    space = room(
        machine("llama-3.1-70b", "A100-80GB"), max_num_batched_tokens=512, max_num_seqs=32, max_model_len=2048
    )
    assert not space.fits
    assert space.missing == 2048 * 327_680 - space.kv_cache
    assert space.tokens == 0


def test_sequences_are_whole_blocks_and_windows_are_honoured() -> None:
    whole = machine("llama-3.1-8b", "L4")
    assert sequences_of(whole, 131_072 * 160, 17) == 5  # 17 tokens are two blocks of 16
    windowed = machine("gpt-oss-20b", "L4")
    each = windowed.facts.sequence_bytes(32_768)
    assert sequences_of(windowed, 10 * each, 32_768) == 10


def test_a_cache_of_8_bits_holds_twice_as_much() -> None:
    question = ask("llama-3.1-8b", "L4", rate=0.1)
    half = ask("llama-3.1-8b", "L4", rate=0.1, kv_fp8=True)
    device = catalogue.find_device("L4")
    one, two = (consider(each, device, 1, SCHEMES["none"]).room for each in (question, half))
    assert one.step == two.step
    assert two.tokens == pytest.approx(2 * one.tokens, abs=32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_that_our_engine_loads(dtype: str) -> None:
    """Exactly, but for norms and biases that packing leaves as they are."""
    path = resolve_model("demo")
    model = load_model(path, load_config(path), create_operations(torch.device("cpu"), getattr(torch, dtype)))
    width = 4 if dtype == "float32" else 2
    planned = loaded(machine(str(path), "cpu", width=width))
    assert planned == pytest.approx(model.weight_bytes, rel=0.01)
    reckoned = preview(EngineConfig(model="demo", dtype=dtype), device="cpu", name="demo")
    assert planned == reckoned.weights


def test_a_step_and_a_token_take_what_our_engine_plans() -> None:
    path = Path(resolve_model("demo"))
    config = load_config(path)
    space = room(
        machine(str(path), "cpu"),
        utilization=0.5,
        max_num_batched_tokens=256,
        max_num_seqs=64,
        max_model_len=2048,
        engine="penstock",
    )
    theirs = plan_memory(
        config,
        weight_bytes=space.weights,
        dtype_bytes=2,
        device="cpu",
        available_bytes=space.device.memory,
        total_bytes=space.device.memory,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        block_size=16,
        utilization=0.5,
        max_model_len=2048,
    )
    assert space.limit == theirs.limit
    assert space.step == theirs.activations
    assert space.kv_bytes_per_token == theirs.kv_bytes_per_token
    assert space.step == activation_bytes(
        config, max_num_batched_tokens=256, max_num_seqs=64, max_model_len=2048, dtype_bytes=2, device="cpu"
    )


def test_smaller_steps_where_memory_is_scarce() -> None:
    """A 32B with 8 bits in a slice: 8,192 tokens in a step would leave nothing for the cache."""
    device = catalogue.find_device("A100-80GB")
    profile = device.profile("4g.40gb")
    assert profile is not None
    question = ask("qwen3-32b", "A100-80GB", rate=0.1, targets={"ttft_p99": 5.0})
    found = consider(question, device.sliced(profile), 1, SCHEMES["int8"])
    assert found.ok
    assert found.room.max_num_batched_tokens < 8192
    roomy = consider(question, device, 1, SCHEMES["int8"])
    assert roomy.room.max_num_batched_tokens == 8192


@pytest.mark.parametrize(
    ("number", "verdicts"),
    [
        ("S7", {"holds", "wrong"}),
        ("S8", {"holds"}),
        ("S9", {"wrong", "assumes"}),
        ("S10", {"holds"}),
        ("S11", {"assumes"}),
        ("T18", {"wrong"}),
        ("T19", {"holds", "assumes", "wrong"}),
        ("T20", {"wrong"}),
        ("T21", {"wrong", "assumes"}),
    ],
)
def test_every_figure_of_the_documents_has_a_verdict(number: str, verdicts: set[str]) -> None:
    assert {claim.verdict for claim in claims() if claim.number == number} == verdicts


def test_the_case_study_does_not_add_up() -> None:
    """T21: 50,000 requests a day at $0.04 are $60,000 a month; at $0.006, $9,000."""
    values = {claim.what: claim.value for claim in claims()}
    assert values["50,000 requests a day at $0.04, a month"] == 60_000
    assert values["the same at $0.006, and what is saved"] == 51_000


def test_bge_m3_is_half_of_what_was_said_at_16_bits() -> None:
    assert weights_gb("bge-m3") == pytest.approx(1.1355, abs=0.001)
    assert weights_gb("bge-m3", width=4) == pytest.approx(2.271, abs=0.001)


def test_the_peak_that_was_measured_is_the_planned_one_within_3_percent() -> None:
    """Of real engines with random weights in real shapes on a CPU, above an empty one
    (benchmarks/plan_memory.py)."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "plan-memory.json"
    runs = json.loads(results.read_text())["runs"]
    assert len(runs) >= 3
    for run in runs:
        facts = read_facts(Path("config.json"), run["config"])
        device, scheme = catalogue.find_device("cpu"), SCHEMES[run["quantization"]]
        one = Machine(facts, device, 1, scheme, 2, 2, fitted().efficiency)
        limits = {"max_num_batched_tokens": 256, "max_num_seqs": 64, "max_model_len": 2048}
        space = room(one, engine="penstock", **limits)
        empty = {name: run["planned"][name] - run["planned_above_empty"][name] for name in run["planned"]}
        assert space.usual_step is not None
        planned = space.weights + run["planned"]["cache"] + space.usual_step
        planned -= empty["weights"] + empty["cache"] + empty["usual_step"]
        assert run["measured"]["peak"] == pytest.approx(planned, rel=0.03)
        assert run["measured"]["ready"] == pytest.approx(space.weights - empty["weights"], rel=0.03)
        assert space.usual_step < space.step  # which is an upper bound
