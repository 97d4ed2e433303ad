"""From a spec to workloads: what fits, where it runs, how it is told, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.deploy.names import slugs
from penstock.deploy.resolve import resolve
from penstock.deploy.workloads import SPARE, Bundle, Workload
from penstock.fleet.hardware import GIB
from penstock.spec import loads

from .matrix import bundle_of


def bundle(models: str, *, pools: str = "{gpu: {hardware: A100-80GB, count: 8}}", more: str = "") -> Bundle:
    return resolve(loads(f"pools: {pools}\nmodels: {models}\n{more}"))


def one(models: str, **more: Any) -> Workload:
    return bundle(models, **more).workloads[0]


def words(workload: Workload) -> dict[str, str]:
    return {flag.name: flag.values[0] if flag.values else "" for flag in workload.flags}


LLAMA = "weights: meta-llama/Llama-3.1-8B, engine: vllm, pool: gpu"


# --- names


def test_names_are_those_of_kubernetes_and_never_the_same() -> None:
    found = slugs(["meta/Llama-3.1:8b", "meta-llama-3.1-8b", "x", "x-burst", "gateway", "3b", "y" * 90])
    assert found["meta/Llama-3.1:8b"] != found["meta-llama-3.1-8b"]
    assert len(set(found.values())) == len(found)
    bursts = {f"{slug}-burst" for slug in found.values()}
    assert not bursts & set(found.values())
    assert found["gateway"] != "gateway"
    assert found["3b"] == "m-3b"
    assert max(map(len, found.values())) <= 40
    assert slugs(["Qwen/Qwen3-8B"]) == {"Qwen/Qwen3-8B": "qwen-qwen3-8b"}


# --- devices


def test_whole_gpus_and_tensor_parallel_are_the_limit() -> None:
    tp4 = one("{a: {weights: meta-llama/Llama-3.1-70B, engine: vllm, pool: gpu, devices: 4}}")
    assert (tp4.resource, tp4.devices_per_node, tp4.nodes) == ("nvidia.com/gpu", 4, 1)
    assert words(tp4)["tensor-parallel-size"] == "4"
    assert tp4.shm == 16 * GIB, "ranks meet in shared memory (S39)"
    assert one(f"{{a: {{{LLAMA}}}}}").shm == 8 * GIB


def test_slices_are_asked_for_by_their_own_names() -> None:
    """T18: with strategy mixed, a pod asks for nvidia.com/mig-3g.40gb, not for nvidia.com/gpu."""
    for workload in bundle_of("mig").workloads:
        assert workload.resource == "nvidia.com/mig-3g.40gb"
        assert workload.devices_per_node == 1
    # S3, T19: 32B in 8 bits fits 40 GB only with little of a cache
    text = next(each for each in bundle_of("mig").workloads if each.model_name == "text")
    assert text.max_model_len == 4096
    assert text.max_num_seqs < 32


def test_several_nodes_share_the_layers() -> None:
    huge = bundle_of("nodes").of("huge")[0]
    assert (huge.nodes, huge.devices_per_node, huge.devices) == (2, 8, 16)
    assert words(huge)["tensor-parallel-size"] == "8"
    assert words(huge)["pipeline-parallel-size"] == "2"


def test_a_cpu_has_no_resource_and_a_cache_of_a_size_that_is_said() -> None:
    demo = bundle_of("init").workloads[0]
    assert demo.resource is None
    assert words(demo)["device"] == "cpu"
    assert demo.memory > int(words(demo)["kv-cache-memory-bytes"])
    assert "tensor-parallel-size" not in words(demo)
    assert words(demo)["threads"] == str(demo.cpus), "and no core that is not its own"


def test_memory_of_pods_is_what_the_documents_say() -> None:
    """S98: 7B about 20 GiB, 70B about 80 GiB."""
    small = one("{a: {weights: mistralai/Mistral-7B-v0.1, engine: vllm, pool: gpu}}")
    large = one("{a: {weights: meta-llama/Llama-2-70b-hf, engine: vllm, pool: gpu, devices: 4}}")
    assert small.memory == 20 * GIB
    assert large.memory == 80 * GIB


# --- tiers


def test_the_floor_is_fixed_and_the_burst_is_scaled() -> None:
    """S35, S62."""
    floor, burst = bundle_of("hub").of("qwen3-8b")
    assert (floor.name, floor.tier, floor.min_replicas, floor.max_replicas) == ("qwen3-8b", "floor", 1, 1)
    assert (burst.name, burst.tier) == ("qwen3-8b-burst", "burst")
    assert (burst.min_replicas, burst.max_replicas) == (0, 3)
    assert not floor.spot
    assert burst.spot
    assert not floor.scaled
    assert burst.scaled


def test_an_hpa_keeps_one_replica_and_keda_ends_the_last() -> None:
    scale = f"{{a: {{{LLAMA}, scale: {{max: 3}}}}}}"
    assert bundle(scale).workloads[1].min_replicas == 0
    assert bundle(scale, more="cluster: {autoscaler: hpa}").workloads[1].min_replicas == 1


def test_without_room_to_scale_there_is_one_tier() -> None:
    found = bundle(f"{{a: {{{LLAMA}, replicas: 2, scale: {{max: 2}}}}}}").workloads
    assert [each.tier for each in found] == ["all"]


@pytest.mark.parametrize(
    ("pool", "taken", "surge"), [(2, "replicas: 1", 1), (2, "replicas: 2", 0), (4, "scale: {max: 3}", 1)]
)
def test_a_rollout_knows_the_free_devices(pool: int, taken: str, surge: int) -> None:
    """T12, G9."""
    pools = f"{{gpu: {{hardware: A100-80GB, count: {pool}}}}}"
    assert one(f"{{a: {{{LLAMA}, {taken}}}}}", pools=pools).surge == surge


def test_a_surge_needs_all_devices_of_a_replica_free() -> None:
    models = "{a: {weights: meta-llama/Llama-3.1-70B, engine: vllm, pool: gpu, devices: 4}}"
    assert one(models, pools="{gpu: {hardware: A100-80GB, count: 7}}").surge == 0
    assert one(models, pools="{gpu: {hardware: A100-80GB, count: 8}}").surge == 1


# --- time


def test_grace_is_longer_than_pre_stop_and_drain() -> None:
    """T13."""
    workload = one(f"{{a: {{{LLAMA}}}}}", more="cluster: {drain: 10m}")
    assert words(workload)["shutdown-timeout"] == "600"
    assert workload.grace >= workload.pre_stop + 600 + SPARE


@pytest.mark.parametrize(("provider", "notice"), [("aks", 30), ("eks", 120), ("gke", 15), ("other", 120)])
def test_spot_nodes_do_not_wait(provider: str, notice: int) -> None:
    """S67: what a spot node's pod does after its notice ends before the node does."""
    pools = "{gpu: {hardware: A100-80GB, count: 2, purchase: spot}}"
    workload = one(f"{{a: {{{LLAMA}}}}}", pools=pools, more=f"cluster: {{provider: {provider}}}")
    assert workload.pre_stop + workload.drain <= notice - 5
    assert float(words(workload)["shutdown-timeout"]) == workload.drain
    assert workload.drain >= notice // 2


def test_load_time_follows_the_weights() -> None:
    """S64, S68: 7B within minutes, 70B about ten."""
    small = one("{a: {weights: mistralai/Mistral-7B-v0.1, engine: vllm, pool: gpu}}")
    large = one("{a: {weights: meta-llama/Llama-2-70b-hf, engine: vllm, pool: gpu, devices: 4}}")
    assert 120 < small.load_time < 240
    assert 600 < large.load_time < 900
    assert one(f"{{a: {{{LLAMA}}}}}", more="cluster: {load_time: 42s}").load_time == 42


# --- flags


def test_what_the_spec_does_not_say_is_reckoned() -> None:
    """S93, S95: the cap is there, is small, and is told; memory use is said."""
    made = bundle(f"{{a: {{{LLAMA}}}}}")
    said = words(made.workloads[0])
    assert said["max-model-len"] == "2048"
    assert said["gpu-memory-utilization"] == "0.92"
    assert int(said["max-num-seqs"]) >= 8
    assert "max_model_len" in made.assumed[0]


def test_routes_say_how_long_requests_are() -> None:
    route = "routes: {r: {targets: [{model: a}], context: 6000, max_tokens: {ceiling: 1000}}}"
    assert words(one(f"{{a: {{{LLAMA}}}}}", more=route))["max-model-len"] == "8192"


def test_what_the_spec_says_wins() -> None:
    workload = one(
        f"{{a: {{{LLAMA}, max_model_len: 4096, memory: 8GiB, "
        "flags: {max-num-seqs: 7, enable-prefix-caching: false, shutdown-timeout: 5}}}"
    )
    said = words(workload)
    assert said["max-model-len"] == "4096"
    assert said["max-num-seqs"] == "7"
    assert workload.max_num_seqs == 7
    assert said["kv-cache-memory-bytes"] == str(8 * GIB)
    assert "gpu-memory-utilization" not in said
    assert "no-enable-prefix-caching" in said
    assert "enable-prefix-caching" not in said
    assert [flag.name for flag in workload.flags].count("shutdown-timeout") == 1


def test_remote_code_is_run_only_where_somebody_wrote_so() -> None:
    """T22."""
    assert all("trust-remote-code" not in words(each) for each in bundle_of("hub").workloads)
    asked = one(f"{{a: {{{LLAMA}, flags: {{trust-remote-code: true}}}}}}")
    assert "--trust-remote-code" in asked.args


# --- images


def test_images_are_pinned() -> None:
    """T22, S69."""
    found = bundle_of("hub").images
    assert found["penstock"].startswith("registry.example.com/llm/penstock:")
    assert found["vllm"] == "vllm/vllm-openai:v0.32.0"
    with pytest.raises(StartupError, match=r"cluster\.images\.vllm.*no tag"):
        bundle(f"{{a: {{{LLAMA}}}}}", more="cluster: {images: {vllm: vllm/vllm-openai}}")
    with pytest.raises(StartupError, match=r"models\.a\.image.*no tag"):
        bundle(f"{{a: {{{LLAMA}, image: 'host.example.com:5000/vllm'}}}}")
    digest = "vllm/vllm-openai@sha256:" + "0" * 64
    assert one(f"{{a: {{{LLAMA}, image: '{digest}'}}}}").image == digest


# --- where


@pytest.mark.parametrize(
    ("provider", "label", "value"),
    [
        ("aks", "nvidia.com/gpu.product", "NVIDIA-A100-SXM4-80GB"),
        ("gke", "cloud.google.com/gke-accelerator", "nvidia-a100-80gb"),
        ("other", "nvidia.com/gpu.product", "NVIDIA-A100-80GB-PCIe"),
    ],
)
def test_nodes_are_known_by_their_devices(provider: str, label: str, value: str) -> None:
    """S34."""
    found = one(f"{{a: {{{LLAMA}}}}}", more=f"cluster: {{provider: {provider}}}").device_labels
    assert found is not None
    assert found[0] == label
    assert value in found[1]


def test_only_aks_taints_its_spot_nodes_by_itself() -> None:
    pools = "{gpu: {hardware: A100-80GB, count: 2, purchase: spot}}"

    def keys(provider: str) -> set[str]:
        found = one(f"{{a: {{{LLAMA}}}}}", pools=pools, more=f"cluster: {{provider: {provider}}}")
        return {taint.key for taint in found.taints}

    assert "kubernetes.azure.com/scalesetpriority" in keys("aks")
    assert keys("eks") == {"nvidia.com/gpu"}


def test_a_pool_says_its_own_labels_and_taints() -> None:
    """S33."""
    small = bundle_of("penstock-gpu").of("small")[0]
    assert {"dedicated", "nvidia.com/gpu"} == {taint.key for taint in small.taints}
    own = "{gpu: {hardware: L4, count: 1, nodes: {labels: {nvidia.com/gpu.product: Mine}}}}"
    assert one("{a: {weights: Qwen/Qwen2.5-0.5B-Instruct, pool: gpu}}", pools=own).device_labels is None


# --- quantisation


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("weights: Qwen/Qwen3-32B, engine: vllm, quantization: fp8", "fp8"),
        ("weights: Qwen/Qwen3-32B, engine: vllm, quantization: fp8_per_block", "fp8_per_block"),
        ("weights: Qwen/Qwen3-32B, engine: vllm, quantization: none", None),
        ("weights: Qwen/Qwen2.5-7B-Instruct-AWQ, engine: vllm, quantization: int4", None),
        ("weights: RedHatAI/Qwen3-32B-quantized.w8a8, engine: vllm, quantization: int8", None),
        ("weights: RedHatAI/Qwen3-32B-quantized.w8a8, engine: vllm", None),
    ],
)
def test_vllm_is_told_only_what_it_makes_at_load(fields: str, said: str | None) -> None:
    """It reads everything else from config.json of the weights; int8 and int4 are no names of its flag."""
    pools = "{gpu: {hardware: H100, count: 8}}"
    assert words(one(f"{{a: {{{fields}, pool: gpu}}}}", pools=pools)).get("quantization") == said


@pytest.mark.parametrize(
    ("scheme", "said"), [("int8", "int8"), ("w8a8", "w8a8"), ("awq", "int4"), ("none", None)]
)
def test_our_engine_is_told_its_own_names(scheme: str, said: str | None) -> None:
    pools = "{gpu: {hardware: cpu}}"
    found = one(f"{{a: {{weights: Qwen/Qwen3-0.6B, pool: gpu, quantization: {scheme}}}}}", pools=pools)
    assert words(found).get("quantization") == said


# --- what cannot be

BAD = {
    "nothing": ("{}", {}, "nothing under models"),
    "illegal slice": (
        "{a: {weights: Qwen/Qwen3-8B, engine: vllm, pool: gpu}}",
        {"pools": "{gpu: {hardware: A100-80GB, mig: 3g.20gb}}"},
        r"pools\.gpu\.mig: .*no MIG profile of A100-80GB.*3g\.40gb",
    ),
    "no such hardware": (
        f"{{a: {{{LLAMA}}}}}",
        {"pools": "{gpu: {hardware: A1000}}"},
        r"pools\.gpu\.hardware",
    ),
    "ranks that do not divide": (
        "{a: {weights: meta-llama/Llama-3.1-8B, engine: vllm, pool: gpu, devices: 3}}",
        {},
        r"models\.a\.devices: 3 do not divide .*32 attention heads.*Write 1 or 2 or 4 or 8",
    ),
    "fits nowhere": (
        "{a: {weights: meta-llama/Llama-3.1-70B, engine: vllm, pool: gpu}}",
        {},
        r"models\.a on pools\.gpu: .*nearest that does: .*A100",
    ),
    "our engine on several devices": (
        "{a: {weights: meta-llama/Llama-3.1-8B, pool: gpu, devices: 2}}",
        {},
        r"models\.a on pools\.gpu.*one device",
    ),
    "an SLO below the floor": (
        "{a: {weights: meta-llama/Llama-3.1-8B, engine: vllm, pool: gpu, slo: {itl_p95: 1ms}}}",
        {},
        r"itl_p95 of 1 ms cannot be met .*floor",
    ),
    "a slice for several": (
        "{a: {weights: Qwen/Qwen3-8B, engine: vllm, pool: gpu, devices: 2}}",
        {"pools": "{gpu: {hardware: A100-80GB, mig: 3g.40gb, count: 2}}"},
        r"models\.a\.devices: 2 slices",
    ),
    "more devices than a node has": (
        "{a: {weights: meta-llama/Llama-3.1-405B, engine: vllm, pool: gpu, devices: 16}}",
        {"pools": "{gpu: {hardware: H100, count: 16}}"},
        r"models\.a\.devices: 16 devices on each node.*nodes: 2",
    ),
    "several nodes with our engine": (
        "{a: {weights: Qwen/Qwen3-8B, pool: gpu, devices: 2, nodes: 2}}",
        {},
        r"models\.a\.nodes: .*engine: vllm",
    ),
    "a folder of this machine": (
        "{a: {weights: ./mine, pool: gpu, max_model_len: 9, flags: {max-num-seqs: 1}}}",
        {"more": "cluster: {load_time: 9, storage: {size: 9GiB}}"},
        r"models\.a\.weights: \./mine is a folder of this machine",
    ),
    "nobody knows the model": (
        "{a: {weights: some/thing-of-mine, engine: vllm, pool: gpu}}",
        {},
        r"models\.a\.weights.*catalogue.*models\.a\.max_model_len.*cluster\.load_time",
    ),
    "a context that it has not": (
        f"{{a: {{{LLAMA}, max_model_len: 999999}}}}",
        {},
        r"models\.a\.max_model_len: 999,999 is longer.*131072 or less",
    ),
    "vLLM on a CPU": (
        "{a: {weights: Qwen/Qwen3-8B, engine: vllm, pool: gpu}}",
        {"pools": "{gpu: {hardware: cpu}}"},
        r"models\.a\.image: .*NVIDIA.*vllm-openai-cpu",
    ),
    "vLLM on TPUs": (
        "{a: {weights: Qwen/Qwen3-0.6B, engine: vllm, pool: gpu}}",
        {"pools": "{gpu: {hardware: TPU-v5e}}"},
        r"models\.a\.image: .*has TPU-v5e.*vllm/vllm-tpu",
    ),
    "the demo in another image": (
        "{a: {weights: demo, engine: vllm, pool: gpu}}",
        {},
        r"models\.a\.weights: demo|models\.a on pools",
    ),
    "int8 of vLLM over 16 bits": (
        "{a: {weights: Qwen/Qwen3-32B, engine: vllm, pool: gpu, quantization: int8}}",
        {},
        r"models\.a\.quantization: int8 over Qwen/Qwen3-32B: vllm does not quantise so at load.*W8A8",
    ),
    "AWQ over 16 bits": (
        "{a: {weights: Qwen/Qwen2.5-7B-Instruct, engine: vllm, pool: gpu, quantization: awq}}",
        {},
        r"models\.a\.quantization: awq .*an AWQ checkpoint.*these weights are none",
    ),
    "weights of another scheme": (
        "{a: {weights: Qwen/Qwen2.5-7B-Instruct-AWQ, engine: vllm, pool: gpu, quantization: fp8}}",
        {},
        r"models\.a\.quantization: fp8 .*come in awq",
    ),
    "a scheme that vLLM has not": (
        "{a: {weights: Qwen/Qwen3-8B, engine: vllm, pool: gpu, quantization: int9}}",
        {},
        r"models\.a\.quantization: int9 .*does not have it",
    ),
    "our engine's w8a8 on a GPU": (
        "{a: {weights: Qwen/Qwen3-8B, pool: gpu, quantization: w8a8}}",
        {},
        r"models\.a\.quantization: w8a8 .*on a CPU only",
    ),
    "our engine's fp8 without units for it": (
        "{a: {weights: Qwen/Qwen3-8B, pool: gpu, quantization: fp8}}",
        {},
        r"models\.a\.quantization: fp8 .*from compute capability 8\.9 on",
    ),
    "a cache that holds no request": (
        "{a: {weights: Qwen/Qwen3-0.6B, pool: gpu, memory: 1MiB}}",
        {"pools": "{gpu: {hardware: cpu}}"},
        r"models\.a\.memory: .*do not hold one request",
    ),
}


JOB = "volume: v, key_secret: k"


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        (f"{{{'a' * 53}: {{schedule: '0 2 * * *', input: /d/a, output: /d/b, {JOB}}}}}", "52 letters"),
        (f"{{{'a' * 57}: {{input: /d/a, output: /d/b, {JOB}}}}}", "56 letters"),
        (
            f"{{j: {{input: /data/in, output: /other/out, {JOB}}}}}",
            r"jobs\.j\.output: /other/out is not",
        ),
        (f"{{j: {{input: /data/in, output: /data/../out, {JOB}}}}}", r"jobs\.j\.output"),
    ],
)
def test_jobs_that_cannot_be_are_refused(jobs: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        bundle(f"{{a: {{{LLAMA}}}}}", more=f"jobs: {jobs}")


def test_what_a_cluster_does_otherwise_is_told() -> None:
    assert any("priced as the floor's" in each for each in bundle_of("hub").assumed)
    made = bundle(f"{{a: {{{LLAMA}}}}}", more="gateway: {ssl_certfile: a, ssl_keyfile: b}")
    assert any("ssl_certfile" in each for each in made.assumed)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_by_the_name_of_its_field(name: str) -> None:
    models, more, message = BAD[name]
    with pytest.raises(StartupError) as caught:
        bundle(models, **more)  # type: ignore[arg-type]
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_model_that_nobody_knows_runs_when_all_is_said() -> None:
    made = bundle(
        "{a: {weights: some/thing, engine: vllm, pool: gpu, max_model_len: 4096, flags: {max-num-seqs: 8}}}",
        more="cluster: {load_time: 5m, storage: {size: 100GiB}}",
    )
    assert words(made.workloads[0])["max-num-seqs"] == "8"
    assert "not known" in made.assumed[0]


def test_tpus_are_found_by_labels_that_the_spec_says() -> None:
    """S15."""
    model = f"{{a: {{{LLAMA}, devices: 4, image: 'vllm/vllm-tpu:v1'}}}}"
    made = bundle(model, pools="{gpu: {hardware: TPU-v5e, count: 8}}")
    assert made.workloads[0].resource == "google.com/tpu"
    assert any("gke-tpu-topology" in each and "pools.gpu.nodes.labels" in each for each in made.assumed)
    labels = (
        "cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 2x2"
    )
    said = bundle(model, pools=f"{{gpu: {{hardware: TPU-v5e, count: 8, nodes: {{labels: {{{labels}}}}}}}}}")
    assert not any("gke-tpu" in each for each in said.assumed)


def test_amds_devices_have_vllms_image_for_them() -> None:
    """S15; not where somebody has a mirror of another one."""
    pools = "{gpu: {hardware: MI300X, count: 8}}"
    made = bundle(f"{{a: {{{LLAMA}}}}}", pools=pools)
    assert made.workloads[0].image == "vllm/vllm-openai-rocm:v0.32.0"
    assert made.workloads[0].resource == "amd.com/gpu"
    assert any("nothing here has run" in each for each in made.assumed)
    with pytest.raises(StartupError, match=r"models\.a\.image: example\.com/vllm:v1 is for NVIDIA"):
        bundle(f"{{a: {{{LLAMA}}}}}", pools=pools, more="cluster: {images: {vllm: 'example.com/vllm:v1'}}")


# --- as planned


@pytest.mark.parametrize(
    "routes", ["{}", "{r: {targets: [{model: a}], max_tokens: {ceiling: 2000}, context: 8000}}"]
)
def test_a_plan_of_the_same_spec_takes_requests_of_the_same_length(
    routes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        f"pools: {{gpu: {{hardware: A100-80GB, count: 8}}}}\nmodels: {{a: {{{LLAMA}}}}}\nroutes: {routes}\n"
    )
    path = tmp_path / "penstock.yaml"
    path.write_text(text)
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["models"][0]["flags"]
    compiled = words(resolve(loads(text)).workloads[0])
    for flag in ("max-model-len", "max-num-batched-tokens"):
        assert compiled[flag] == str(planned[f"--{flag}"])


def test_an_slo_bounds_how_many_run_at_a_time() -> None:
    """The cache holds 54 of them; 25 keep the time between tokens."""
    pools = "{gpu: {hardware: L4, count: 1}}"
    fields = "weights: Qwen/Qwen2.5-7B-Instruct, engine: vllm, pool: gpu, slo: {itl_p99: 100ms}"
    found = one(f"{{a: {{{fields}}}}}", pools=pools)
    assert words(found)["max-num-seqs"] == "32"
