"""What a spec has decided is planned with as it is, and said; what the load takes beyond it is said, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main

POOLS = """
version: 1
pools:
  floor: {hardware: A100-80GB, count: 2, price_per_hour: 3.43, price_as_of: 2026-11-01, price_source: ours}
  spot: {hardware: A100-80GB, count: 1, price_per_hour: 1.20, price_as_of: 2026-11-01, price_source: ours, purchase: spot}
  cut: {hardware: A100-80GB, count: 4, mig: 3g.40gb, price_per_hour: 1.70, price_as_of: 2026-11-01, price_source: ours}
  dev: {hardware: A100-80GB, count: 1, time_slicing: 4}
  large: {hardware: H100, count: 32, price_per_hour: 4, price_as_of: 2026-11-01, price_source: ours, nodes: {devices: 4}}
models:
"""  # noqa: E501


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`plan(fields, *flags)`: of an 8B with those fields, as JSON; the last of several models."""

    def run(*fields: str, flags: str = "", weights: str = "meta-llama/Llama-3.1-8B", status: int = 0) -> Any:
        models = [
            f"  m{number}: {{weights: {weights}, engine: vllm, slo: {{ttft_p99: 5s}}, {each}}}"
            for number, each in enumerate(fields)
        ]
        spec = tmp_path / "penstock.yaml"
        spec.write_text(POOLS + "\n".join(models) + "\n")
        arguments = ["plan", str(spec), "--rate", "0.5", "--peak", "1", "--json", *flags.split()]
        assert main(arguments) == status
        caught = capsys.readouterr()
        return json.loads(caught.out)["models"][-1] if status == 0 else caught.err

    return run


def noted(found: Any, part: str) -> bool:
    return any(part in note for note in found["notes"])


def test_replicas_are_the_floor(plan: Any) -> None:
    assert plan("pool: floor")["devices"]["replicas"] == 1
    two = plan("pool: floor, replicas: 2")
    assert (two["devices"]["replicas"], two["devices"]["spot_burst_replicas"]) == (2, 0)
    assert two["costs"]["dollars_per_hour"] == "6.86"
    assert noted(two, "decided: 2 replicas (models.m0.replicas)")


def test_too_few_of_them_are_said(plan: Any) -> None:
    found = plan("pool: floor, replicas: 1", flags="--rate 30 --peak 60")
    assert found["devices"]["replicas"] > 1
    assert noted(found, "models.m0.replicas is 1, and the average rate takes")
    assert noted(found, "models.m0.scale would start them")
    assert noted(found, "and pool floor has 2")


def test_the_burst_has_its_own_pool_and_price(plan: Any) -> None:
    found = plan("pool: floor, replicas: 1, scale: {max: 2, burst: spot}", flags="--rate 5 --peak 40")
    devices = found["devices"]
    assert devices["burst_pool"] == "spot"
    assert devices["spot_burst_replicas"] > 1
    more = float(found["costs"]["dollars_per_hour_of_burst"])
    assert more == pytest.approx(1.2 * devices["spot_burst_replicas"])
    assert noted(
        found,
        "models.m0.scale.max is 2, and the peak takes "
        f"{devices['replicas'] + devices['spot_burst_replicas']}",
    )
    assert noted(
        found, f"at the peak this takes {devices['spot_burst_replicas']} devices of pool spot, which has 1"
    )
    assert noted(found, "decided: 1 replica, up to 2 on spot under load")


def test_models_of_a_pool_share_its_devices(plan: Any) -> None:
    found = plan("pool: floor, replicas: 1", "pool: floor, replicas: 1", flags="--rate 3 --peak 12")
    devices = found["devices"]
    average, peak = 2 * devices["count"], 2 * (devices["count"] + devices["spot_burst_replicas"])
    assert noted(found, f"m0, m1 together take {average} devices, {peak} at the peak, and pool floor has 2")


def test_slices_have_the_pools_price(plan: Any) -> None:
    found = plan("pool: cut, replicas: 1")
    assert found["devices"]["kind"] == "A100-80GB 3g.40gb"
    assert found["price"]["dollars_per_device_hour"] == "1.7"  # not three sevenths of it
    assert noted(found, "decided: slices of 3g.40gb (pools.cut.mig)")
    whole = plan("pool: cut", flags="--gpu A100-80GB")
    assert whole["devices"]["kind"] == "A100-80GB"


def test_a_slice_that_the_device_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "penstock.yaml"
    spec.write_text(POOLS.replace("mig: 3g.40gb", "mig: 5g.50gb") + "  m: {weights: demo, pool: cut}\n")
    assert main(["plan", str(spec)]) == 2
    assert "'5g.50gb' is no MIG profile of A100-80GB" in capsys.readouterr().err


def test_taking_turns_is_said_to_be_for_development(plan: Any) -> None:
    assert noted(
        plan("pool: dev"), "4 pods take turns on a device (pools.dev.time_slicing), for development only"
    )


def test_flags_are_taken_and_others_are_named(plan: Any) -> None:
    found = plan(
        "pool: floor, flags: {max-num-seqs: 17, max-num-batched-tokens: 1024, gpu-memory-utilization: 0.8,"
        " kv-cache-dtype: fp8, enable-lora: true}"
    )
    assert found["flags"]["--max-num-seqs"] == 17
    assert found["flags"]["--max-num-batched-tokens"] == 1024
    assert found["flags"]["--gpu-memory-utilization"] == 0.8
    assert found["flags"]["--kv-cache-dtype"] == "fp8"
    assert noted(found, "max-num-seqs 17")
    assert noted(found, "not in these figures: enable-lora (models.m0.flags)")
    wins = plan("pool: floor, flags: {gpu-memory-utilization: 0.8}", flags="--gpu-memory-utilization 0.7")
    assert wins["flags"]["--gpu-memory-utilization"] == 0.7


def test_a_cache_of_a_given_size_is_no_larger(plan: Any) -> None:
    found = plan("pool: floor, memory: 4GB")
    assert found["memory_per_device"]["kv_cache"] == 4_000_000_000
    assert found["capacity"]["kv_tokens"] == 4_000_000_000 // (131_072 * 16) * 16
    assert noted(found, "decided: a KV cache of 4.0 GB (models.m0.memory)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "max-num-seqs: none-such",
            "models.m0.flags.max-num-seqs is 'none-such': it must be a positive integer",
        ),
        (
            "gpu-memory-utilization: 3",
            "models.m0.flags.gpu-memory-utilization is 3: it must be from 0.1 to 1",
        ),
    ],
)
def test_a_flag_whose_value_is_none(plan: Any, flags: str, message: str) -> None:
    assert message in plan(f"pool: floor, flags: {{{flags}}}", status=2)


def test_a_replica_of_several_nodes(plan: Any) -> None:
    """Of four devices each, as the pool says; one node would not do."""
    text = plan("pool: large, devices: 8", weights="meta-llama/Llama-3.1-70B", status=2)
    assert "tensor parallel 8 is more than the 4 devices of a machine" in text
    found = plan("pool: large, devices: 8, nodes: 2", weights="meta-llama/Llama-3.1-70B")
    assert (found["devices"]["tensor_parallel"], found["devices"]["count"]) == (4, 8)
    assert noted(
        found, "decided: 8 devices to a replica on 2 nodes, the layers in 2 parts (models.m0.devices, .nodes)"
    )
    assert noted(
        found, "each replica is on 2 nodes: what the network between them takes is not in these speeds"
    )
