"""Whole plans: what is chosen, the options side by side, and what cannot be had."""

from __future__ import annotations

import re

import pytest

from penstock.core.errors import StartupError
from penstock.fleet import catalogue
from penstock.fleet.options import TIME_SLICING, profile_named
from penstock.fleet.plan import Plan, PlanError, plan
from penstock.fleet.prices import Cloud
from penstock.fleet.record import record
from tests.fleet.asking import ask

DOLLAR = 10**9


def the_documents_hub(rate: float) -> Plan:
    """Qwen3-VL-8B and Qwen3-32B at 8 bits, on A100-80GB."""
    slow = {"ttft_p99": 5.0}
    return plan(
        [
            ask("qwen3-vl-8b", "A100-80GB", rate=rate, targets=slow, engine="vllm"),
            ask("qwen3-32b", "A100-80GB", rate=rate, targets=slow, scheme="int8", engine="vllm"),
        ]
    )


def test_the_cheapest_device_that_keeps_the_targets_is_chosen() -> None:
    priced = [
        name for name, device in catalogue.devices().items() if device.price and device.vendor == "nvidia"
    ]
    made = plan([ask("llama-3.1-8b", *priced)]).models[0]
    able = [each for each in made.others if each.ok and each.costs]
    assert made.chosen.costs is not None
    assert made.chosen.costs.per_hour == min(each.costs.per_hour for each in able if each.costs)
    assert made.chosen.point is not None
    assert made.chosen.point.ttft_p99 <= 1.0


def test_small_volume_goes_into_slices_and_more_to_whole_devices() -> None:
    """S6: start with B, move to A when volume grows; here with the rate at which."""
    small = the_documents_hub(0.1).comparison
    assert small.recommended == "B"
    a, b, _ = small.options
    assert (a.devices, b.devices) == (2, 1)
    assert a.per_hour is not None
    assert b.per_hour is not None
    assert a.per_hour == 2 * b.per_hour  # S5: twice the cost
    assert b.layout == (("4g.40gb qwen3-32b", "3g.40gb qwen3-vl-8b"),)  # T18: all seven slices
    limit = small.move_at["qwen3-32b"]
    assert the_documents_hub(limit * 0.98).comparison.recommended == "B"
    assert the_documents_hub(limit * 1.05).comparison.recommended == "A"


@pytest.mark.parametrize(("engine", "said"), [("penstock", True), ("vllm", False)])
def test_speeds_of_our_engine_on_a_gpu_are_not_called_measured(engine: str, said: bool) -> None:
    notes = plan([ask("qwen3-8b", "A100-80GB", engine=engine)]).models[0].notes
    assert any("our engine has not been measured on GPUs" in note for note in notes) is said


def test_taking_turns_is_refused_for_production() -> None:
    """S4."""
    c = the_documents_hub(0.1).comparison.options[2]
    assert not c.production
    assert c.why == TIME_SLICING
    assert c.isolation == "none"


def test_a_device_that_cannot_be_cut_has_no_option_b() -> None:
    made = plan([ask("llama-3.1-70b", "H100", rate=0.5, scheme="fp8")])
    b = made.comparison.options[1]
    assert not b.possible
    assert "No slice of H100 holds llama-3.1-70b" in b.why
    assert made.comparison.recommended == "A"


def test_rates_beyond_one_replica_take_more_of_them() -> None:
    one, many = (plan([ask("llama-3.1-8b", "A100-80GB", rate=rate)]).models[0].chosen for rate in (1, 100))
    assert one.replicas == 1
    assert many.replicas == -(-100 // many.usable)
    assert many.point is not None
    assert many.point.utilisation <= 0.85


def test_the_peak_is_for_spot() -> None:
    """S62: the floor on demand, the burst on spot."""
    made = plan([ask("llama-3.1-8b", "A100-80GB", rate=10, peak=40)]).models[0].chosen
    assert made.burst == made.peak_replicas - made.replicas > 0
    assert made.costs is not None
    assert made.price_per_hour is not None
    assert made.costs.per_hour == made.price_per_hour * made.replicas


def test_a_stricter_time_between_tokens_makes_steps_smaller() -> None:
    loose = plan([ask("llama-3.1-8b", "A100-80GB")]).models[0].chosen.room.max_num_batched_tokens
    strict = plan([ask("llama-3.1-8b", "A100-80GB", targets={"itl_p95": 0.1})]).models[0]
    assert strict.chosen.room.max_num_batched_tokens < loose
    assert strict.chosen.machine.prefill(strict.chosen.room.max_num_batched_tokens) <= 0.1


@pytest.mark.parametrize(
    ("model", "gpu", "engine", "why"),
    [
        ("llama-3.1-8b", "A100-80GB", "penstock", ""),
        ("llama-3.1-8b", "V100-32GB", "vllm", "its kernels need compute capability 7.5, V100-32GB has 7.0"),
        ("llama-3.1-8b", "MI300X", "vllm", "it has no kernels for MI300X"),
        ("llama-3.2-1b", "TPU-v5e", "vllm", "it has no kernels for TPU-v5e"),
        ("mixtral-8x7b", "H200", "vllm", "it does not serve MixtralForCausalLM"),
        ("bge-m3", "L4", "vllm", "its encoders (XLMRobertaModel) have not run on GPUs"),
        ("bge-m3", "cpu", "penstock", ""),
        ("qwen3-vl-8b", "A100-80GB", "vllm", "it does not serve Qwen3VLForConditionalGeneration"),
        ("llama-3.2-1b", "cpu", "penstock", ""),
    ],
)
def test_which_engine_and_why(model: str, gpu: str, engine: str, why: str) -> None:
    """S15, S26: what our kernels do not do is given to vLLM, by name."""
    made = plan([ask(model, gpu, rate=0.01, targets={}, prompt=100, output=50)]).models[0]
    assert made.chosen.engine == engine
    assert why in made.chosen.engine_note
    assert (made.advice.engine == "Penstock") == (engine == "penstock")


def test_ten_requests_a_day_are_advised_against() -> None:
    """S94."""
    made = plan([ask("llama-3.1-8b", "L4", rate=10 / 86_400)]).models[0]
    assert any("10 requests a day do not pay for a device" in text for text in made.advice.warnings)


def test_quantised_weights_are_to_be_compared() -> None:
    """S13."""
    made = plan([ask("qwen3-32b", "A100-80GB", scheme="int8")]).models[0]
    assert any("evaluation set" in note for note in made.notes)


def test_a_missing_price_is_told_and_nothing_is_invented() -> None:
    made = plan([ask("llama-3.1-8b", "L4")])
    assert made.per_hour is None
    assert made.models[0].chosen.costs is None
    assert any("no dated price of L4" in note for note in made.models[0].notes)
    given = plan([ask("llama-3.1-8b", "L4", price_per_hour=1_200_000_000)])
    assert given.per_hour == 1_200_000_000 * given.models[0].chosen.devices


def test_against_a_cloud() -> None:
    made = plan([ask("llama-3.1-8b", "A100-80GB", rate=5, cloud=Cloud(DOLLAR // 10, DOLLAR // 10))]).models[0]
    even = made.break_even
    assert even is not None
    assert made.chosen.costs is not None
    whole = made.chosen.costs.full_per_thousand_requests
    assert even.utilisation == pytest.approx(whole / even.cloud_per_thousand, rel=1e-6)


def test_a_slice_alone() -> None:
    made = plan([ask("llama-3.1-8b", "A100-80GB", rate=0.5, mig="3g.40gb")]).models[0].chosen
    assert made.device.name == "A100-80GB 3g.40gb"
    assert made.costs is not None
    whole = catalogue.find_device("A100-80GB").price
    assert whole is not None
    assert made.costs.per_hour == whole.per_hour * 3 // 7


# what cannot be had


def test_a_model_that_does_not_fit_names_the_nearest_that_does() -> None:
    with pytest.raises(
        PlanError,
        match=r"llama-3-70b cannot be served on A100-80GB \(1 x A100-80GB: its weights alone take 141\.1 GB.*"
        r"The nearest that does: 2 replicas of 2 x A100-80GB \(--gpu A100-80GB --tp 2\)",
    ):
        plan([ask("llama-3-70b", "A100-80GB", rate=0.1, tp=1)])


def test_a_context_that_does_not_fit_says_which_does() -> None:
    wanted = {"targets": {}, "rate": 0.1, "tp": 1, "engine": "vllm"}
    with pytest.raises(PlanError) as caught:
        plan([ask("llama-3.1-8b", "L4", max_model_len=131_072, **wanted)])
    found = re.search(r"holds ([\d,]+) tokens, .*131,072; --max-model-len (\d+) would fit", str(caught.value))
    assert found is not None, str(caught.value)
    assert found[1].replace(",", "") == found[2]
    made = plan([ask("llama-3.1-8b", "L4", max_model_len=int(found[2]), **wanted)])
    assert made.models[0].chosen.ok


def test_a_model_that_fits_smaller_says_so() -> None:
    with pytest.raises(PlanError, match=r"The nearest that does: .* in fp8 .*--quantization fp8"):
        plan([ask("llama-3.1-405b", "H100", rate=0.1)])


def test_a_model_that_fits_nowhere_says_how_large_it_is() -> None:
    question = ask("deepseek-v3", "T4", rate=0.1)
    with pytest.raises(PlanError, match=r"The nearest that does: 4 x B200 \(--gpu B200 --tp 4\)"):
        plan([question])


def test_an_illegal_slice_lists_the_legal_ones() -> None:
    with pytest.raises(
        StartupError, match=r"'5g\.50gb' is no MIG profile of A100-80GB\. It has 1g\.10gb, .*7g\.80gb"
    ):
        profile_named(catalogue.find_device("A100-80GB"), "5g.50gb")
    with pytest.raises(StartupError, match=r"is no MIG profile of L4\. It has none: it cannot be cut"):
        plan([ask("llama-3.2-1b", "L4", mig="3g.40gb")])


def test_targets_below_the_floor_name_the_floor() -> None:
    with pytest.raises(
        PlanError,
        match=r"ttft_p99 of 45 ms cannot be met on L4: its floor, one request alone on \d x L4, is \d+ ms",
    ) as caught:
        plan([ask("llama-3.1-8b", "L4", targets={"ttft_p99": 0.045})])
    assert re.search(r"\d x (H100|H200|B200|A100-80GB|L40S) would", str(caught.value))


def test_targets_that_nothing_keeps() -> None:
    with pytest.raises(PlanError, match="Nothing in the catalogue keeps it"):
        plan([ask("llama-3.1-8b", "L4", targets={"ttft_p99": 0.0001})])


@pytest.mark.parametrize(
    ("model", "tp", "why"),
    [
        ("qwen2.5-7b", 8, "28 attention heads do not divide by 8. Use 1 or 2 or 4"),
        ("llama-3.1-8b", 3, "32 attention heads do not divide by 3. Use 1 or 2 or 4 or 8"),
        ("falcon-7b", 2, "71 attention heads do not divide by 2. Use 1."),
    ],
)
def test_ranks_that_do_not_divide(model: str, tp: int, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        plan([ask(model, "A100-80GB", tp=tp)])


def test_more_ranks_than_a_machine_has() -> None:
    """S109: more than one machine is told, not planned."""
    with pytest.raises(PlanError, match="tensor parallel 16 is more than the 8 devices of a machine"):
        plan([ask("llama-3.1-70b", "A100-80GB", tp=16)])


def test_contexts_that_the_model_does_not_have() -> None:
    with pytest.raises(PlanError, match="--max-model-len 9,000 is longer than the context of phi-2, 2,048"):
        plan([ask("phi-2", "L4", max_model_len=9000)])
    with pytest.raises(PlanError, match="are 3,000, and phi-2 takes 2,048"):
        plan([ask("phi-2", "L4", prompt=2800)])


def test_devices_that_the_pool_does_not_have_are_told() -> None:
    made = plan([ask("llama-3.1-8b", "A100-80GB", rate=100, count=1)]).models[0]
    peak = made.chosen.peak_replicas * made.chosen.tp
    wanted = f"this takes {made.chosen.devices} devices, {peak} at the peak, and the pool has 1"
    assert wanted in made.notes
    assert not any(
        "the pool has" in note for note in plan([ask("llama-3.1-8b", "L40S", count=9)]).models[0].notes
    )


# the record


def test_every_estimate_has_its_error_bar() -> None:
    made = plan([ask("llama-3.1-8b", "A100-80GB", rate=2)])
    expected = record(made)["models"][0]["expected"]
    for name in ("ttft_p50", "ttft_p99", "tpot", "e2e_p50", "most_requests_per_second"):
        assert expected[name]["low"] < expected[name]["expected"] < expected[name]["high"]
    fit = made.fit
    assert expected["tpot"]["high"] / expected["tpot"]["expected"] == pytest.approx(1 / fit.low, rel=1e-4)


def test_the_flags_are_those_that_were_planned() -> None:
    made = plan([ask("llama-3-70b", "A100-80GB", rate=0.2, engine="vllm", kv_fp8=True)])
    flags = record(made)["models"][0]["flags"]
    assert flags["--tensor-parallel-size"] == made.models[0].chosen.tp > 1
    assert flags["--kv-cache-dtype"] == "fp8"
    assert flags["--max-model-len"] == 2048
    assert flags["--gpu-memory-utilization"] == 0.92


def test_capacity_falls_with_the_context() -> None:
    """S11: a shorter context makes room in proportion."""
    made = plan([ask("llama-3-70b", "A100-80GB", rate=0.1, scheme="awq", engine="vllm", tp=1, targets={})])
    capacity = record(made)["models"][0]["capacity"]
    by = {int(name): value for name, value in capacity["by_context"].items()}
    assert by[1024] == capacity["kv_tokens"] // 1024
    assert by[8192] == capacity["kv_tokens"] // 8192
    assert by[1024] >= 7 * by[8192]
