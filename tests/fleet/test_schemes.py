"""What a scheme of quantisation is for each engine: as the engines have it, and as plans write it."""

from __future__ import annotations

import pytest

from penstock.core.errors import StartupError
from penstock.fleet import catalogue, schemes
from penstock.fleet.facts import SCHEMES
from penstock.fleet.plan import plan
from penstock.fleet.question import why_not_penstock
from penstock.fleet.record import flags
from penstock.kernels.capability import Device, check_quantization
from penstock.kernels.quantization import SCHEMES as KERNELS
from tests.fleet.asking import ask

H100 = catalogue.find_device("H100")


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize(
    ("gpu", "device"), [("cpu", "cpu"), ("A100-80GB", "cuda"), ("L4", "cuda"), ("T4", "cuda")]
)
def test_our_engine_is_planned_for_what_it_starts_with(scheme: str, gpu: str, device: str) -> None:
    """The planner's word, and that of engine/build.py on the same flag and device."""
    planned = why_not_penstock(
        catalogue.find_model("llama-3.1-8b"), catalogue.find_device(gpu), 1, SCHEMES[scheme]
    )
    if schemes.served("penstock", scheme) is None:
        assert planned is not None
        return
    value = schemes.flag("penstock", scheme) or "none"
    assert value == "none" or value in KERNELS
    known = catalogue.find_device(gpu)
    capability = (int(known.capability), round(known.capability % 1 * 10))
    there = Device("cpu") if device == "cpu" else Device("cuda", gpu, capability)
    refused = None
    try:
        check_quantization(value, "bfloat16", there, KERNELS)
    except StartupError as error:
        refused = error.message
    assert (planned is None) == (refused is None), f"planned: {planned}; started: {refused}"


def test_8_bits_on_a_gpu_are_ours_and_multiplied_at_16() -> None:
    """vLLM's int8 takes weights that come so, and multiplies integers."""
    made = plan([ask("llama-3.1-8b", "A100-80GB", scheme="int8")]).models[0]
    assert made.chosen.engine == "penstock"
    assert flags(made.chosen)["--quantization"] == "int8"
    theirs = plan([ask("llama-3.1-8b", "A100-80GB", scheme="int8", engine="vllm")]).models[0]
    assert "--quantization" not in flags(theirs.chosen), "vLLM has no int8"
    assert any("W8A8 checkpoint" in note for note in theirs.notes)
    assert theirs.chosen.machine.rate == 2 * made.chosen.machine.rate


def test_fp8_is_ours_where_there_are_units_for_it() -> None:
    assert plan([ask("llama-3.1-8b", "L4", scheme="fp8", tp=1)]).models[0].chosen.engine == "penstock"
    made = plan([ask("llama-3.1-8b", "A100-80GB", scheme="fp8", tp=1)]).models[0]
    assert made.chosen.engine == "vllm"
    assert "from compute capability 8.9 on; A100-80GB has 8.0" in made.chosen.engine_note


@pytest.mark.parametrize(("scheme", "value"), [("int8", "int8"), ("int4", "int4"), ("awq", "int4")])
def test_our_engine_is_told_its_own_names(scheme: str, value: str) -> None:
    made = plan([ask("llama-3.2-1b", "cpu", rate=0.01, targets={}, scheme=scheme)]).models[0]
    assert made.chosen.engine == "penstock"
    assert flags(made.chosen)["--quantization"] == value


@pytest.mark.parametrize(("scheme", "value"), [("fp8", "fp8"), ("awq", None), ("gptq", None)])
def test_vllm_is_told_what_it_quantises_at_load(scheme: str, value: str | None) -> None:
    made = plan([ask("llama-3.1-8b", "H100", scheme=scheme, engine="vllm")]).models[0]
    assert flags(made.chosen).get("--quantization") == value
    assert any("checkpoint" in note for note in made.notes) == (value is None)


def test_every_flag_of_vllm_is_a_name_that_it_has() -> None:
    assert {each.flag for each in schemes.VLLM.values() if each.flag} <= schemes.VLLM_NAMES
    assert not {"int8", "int4", "w8a8"} & schemes.VLLM_NAMES
    assert set(schemes.VLLM) == set(SCHEMES)


def test_what_vllm_reads_from_weights_and_makes_at_load() -> None:
    """MXFP4: gpt-oss comes so, and 0.32 makes it of 16-bit weights."""
    assert schemes.told("vllm", "mxfp4", "mxfp4") is None
    assert schemes.told("vllm", "mxfp4", "none") == "mxfp4"
    assert schemes.unserved("penstock", "fp8", "fp8-block", H100) is None, "restored, and rounded anew"
    assert "but in fp8" in str(schemes.unserved("penstock", "fp8", "awq", H100))
    assert "to 16 bits" in str(schemes.why_not("penstock", "fp8-block", "fp8-block", H100))
    assert schemes.unserved("vllm", "mxfp4", "none", H100) is None
    assert "vllm-bnb-plugin" in str(schemes.unserved("vllm", "bitsandbytes", "none", H100))
    assert schemes.told("vllm", "bitsandbytes", "none") == "bitsandbytes"  # of an image that has it
    assert schemes.told("vllm", "none", "none") is None


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int8", 8), ("INT4", 4), ("fp8_per_block", 8), ("awq_marlin", 4), ("none", 16), ("torchao", 4)],
)
def test_bits_by_any_name(name: str, bits: int) -> None:
    assert schemes.bits(name) == bits


@pytest.mark.parametrize(
    ("gpu", "scheme"),
    [
        ("H100", "fp8"),
        ("L40S", "fp8"),
        ("L4", "fp8"),
        ("A100-80GB", "awq"),
        ("T4", "awq"),
        ("cpu", "int8"),
        ("MI300X", "fp8"),
    ],
)
def test_which_scheme_suits_a_device(gpu: str, scheme: str) -> None:
    """S12: FP8 where there are units for it, four bits elsewhere."""
    assert schemes.suited(catalogue.find_device(gpu)) == scheme


def test_what_suits_is_taken_where_it_costs_less_and_told_where_nobody_asked() -> None:
    asked = {"rate": 0.5, "targets": {}, "engine": "vllm"}
    plain = plan([ask("llama-3.1-70b", "H100", **asked)]).models[0]
    assert plain.chosen.scheme.name == "none"
    told = [note for note in plain.notes if note.startswith("fp8 suits H100")]
    auto = plan([ask("llama-3.1-70b", "H100", auto=True, **asked)]).models[0]
    assert auto.chosen.scheme.name == "fp8"
    assert auto.chosen.devices < plain.chosen.devices
    assert f"{auto.chosen.devices} devices would do in place of {plain.chosen.devices}" in told[0]
    assert any("evaluation set" in note for note in auto.notes)
    assert not [note for note in auto.notes if "suits" in note]
