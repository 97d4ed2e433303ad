"""The GPU Operator's values: legal slices, as many as the pools say; sharing that promises nothing."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli.init import example
from penstock.core.errors import StartupError
from penstock.deploy import formats
from penstock.deploy.operator import CHART, dcgm, files, google, mig, sharing
from penstock.deploy.resolve import resolve
from penstock.deploy.workloads import Bundle
from penstock.fleet.catalogue import find_device
from penstock.fleet.hardware import pack
from penstock.spec import loads
from penstock.spec.model import Spec
from tests.deploy.schemas import problems

SLICES = """
pools:
  reading: {hardware: A100-80GB, mig: 3g.40gb, count: 1}
  text: {hardware: A100-80GB, mig: 4g.40gb, count: 1, nodes: {taints: [{key: gpu-node, value: "true"}]}}
models: {small: {weights: Qwen/Qwen2.5-7B-Instruct, pool: reading, engine: vllm}}
"""
TOGETHER = SLICES.replace(', nodes: {taints: [{key: gpu-node, value: "true"}]}', "")

KEYS = {
    "driver": {"enabled"},
    "toolkit": {"enabled", "installDir", "env"},
    "devicePlugin": {"enabled", "config"},
    "mig": {"strategy"},
    "migManager": {"enabled", "env", "config"},
    "dcgmExporter": {"enabled", "config", "serviceMonitor"},
    "daemonsets": {"tolerations"},
    "hostPaths": {"driverInstallDir"},
}
"""Of the chart's values.yaml, at the version that is pinned."""


def bundle(text: str) -> Bundle:
    return resolve(loads(text, "penstock.yaml"))


def values(text: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(files(bundle(text))["gpu-operator/values.yaml"])
    return made


def pools(**given: tuple[str, str, int]) -> Spec:
    return Spec.model_validate(
        {
            "pools": {
                name: {"hardware": kind, "mig": cut, "count": n} for name, (kind, cut, n) in given.items()
            }
        }
    )


def test_pools_of_the_same_nodes_share_a_gpu() -> None:
    """T18: two slices of three sevenths leave one idle; 4g and 3g use all seven."""
    (node,) = mig.nodes(loads(TOGETHER, "spec"))
    assert node.layouts == ((("3g.40gb", 1), ("4g.40gb", 1)),)
    assert node.pools == ("reading", "text")
    assert mig.config([node])["mig-configs"][node.config] == [
        {"devices": [0], "mig-enabled": True, "mig-devices": {"3g.40gb": 1, "4g.40gb": 1}}
    ]


def test_pools_of_other_nodes_do_not() -> None:
    first, second = mig.nodes(loads(SLICES, "spec"))
    assert (first.layouts, second.layouts) == (((("3g.40gb", 1),),), ((("4g.40gb", 1),),))
    assert first.config != second.config


@given(
    st.sampled_from(["A100-40GB", "A100-80GB", "H100", "H200", "B200"]),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_what_is_cut_is_legal_and_as_much_as_was_asked_for(kind: str, wanted: list[tuple[int, int]]) -> None:
    device = find_device(kind)
    given = {f"p{n}": (kind, device.mig[which].name, count) for n, (which, count) in enumerate(wanted)}
    made: Counter[str] = Counter()
    nodes = mig.nodes(pools(**given))
    for node in nodes:
        assert 1 <= len(node.layouts) <= device.node
        for layout in node.layouts:
            profiles = [device.profile(name) for name, count in layout for _ in range(count)]
            assert all(profiles)
            assert pack([each for each in profiles if each]) is not None
            made.update(dict(layout))
    asked: Counter[str] = Counter()
    for _, cut, count in given.values():
        asked[cut] += count
    assert made == asked
    document = mig.config(nodes)
    assert document["version"] == "v1"
    assert document["mig-configs"]["all-disabled"] == [{"devices": "all", "mig-enabled": False}]
    for node in nodes:
        entries = document["mig-configs"][node.config]
        assert sorted(itertools.chain.from_iterable(each["devices"] for each in entries)) == list(
            range(len(node.layouts))
        )


def test_more_slices_than_a_node_has_are_more_nodes() -> None:
    nodes = mig.nodes(pools(many=("H100", "7g.80gb", 10)))
    assert [len(node.layouts) for node in nodes] == [8, 2]
    assert len({node.config for node in nodes}) == 2
    assert len({node.config for node in mig.nodes(pools(many=("H100", "7g.80gb", 16)))}) == 1


@pytest.mark.parametrize(
    ("hardware", "cut", "message"),
    [
        (
            "A100-80GB",
            "3g.20gb",
            r"pools.p.mig: A100-80GB has no slice 3g.20gb. It can be cut into 1g.10gb, ",
        ),
        ("L4", "1g.5gb", r"pools.p.mig: L4 has no slice 1g.5gb. It cannot be cut; leave mig out."),
    ],
)
def test_a_slice_that_there_is_not(hardware: str, cut: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        mig.nodes(pools(p=(hardware, cut, 1)))


@pytest.mark.parametrize("provider", ["aks", "eks", "gke", "other"])
def test_the_chart_knows_every_value(provider: str) -> None:
    made = values(SLICES + f"cluster: {{provider: {provider}, prometheus_labels: {{release: p8s}}}}\n")
    for name, entries in made.items():
        assert set(entries) <= KEYS[name], name
    # S29
    assert made["driver"] == {"enabled": False}
    assert all(made[part]["enabled"] for part in ("toolkit", "devicePlugin", "migManager", "dcgmExporter"))
    assert CHART.startswith("v")
    assert made["mig"] == {"strategy": "mixed"}
    config = yaml.safe_load(made["migManager"]["config"]["data"]["config.yaml"])
    assert config == yaml.safe_load(files(bundle(SLICES))["gpu-operator/mig-parted.yaml"])
    assert made["dcgmExporter"]["serviceMonitor"]["additionalLabels"] == {"release": "p8s"}
    assert {"key": "gpu-node", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in made[
        "daemonsets"
    ]["tolerations"]
    reboot = [{"name": "WITH_REBOOT", "value": "true"}]
    assert made["migManager"].get("env") == (None if provider == "other" else reboot)
    assert ("hostPaths" in made) == (provider == "gke")
    source = [{"name": "RUNTIME_CONFIG_SOURCE", "value": "file"}]
    assert made["toolkit"].get("env") == (source if provider == "gke" else None)


@pytest.mark.parametrize("provider", ["aks", "gke"])
def test_what_gke_wants_before(provider: str) -> None:
    """Nodes without its own device plugin, a driver, and a quota, or no pod of the operator starts."""
    made = files(bundle(SLICES + f"cluster: {{provider: {provider}}}\n"))
    text = made["gpu-operator/README.md"]
    gke = provider == "gke"
    assert (f"--node-labels {google.LABEL}" in text) == gke
    assert ("gpu-driver-version=disabled" in text) == gke
    assert ("nvidia-driver-installer" in text) == gke
    assert ("<<EOF" in text) == gke
    if gke:
        assert text.index("ResourceQuota") < text.index("helm install")
        quota = yaml.safe_load(text.partition("<<EOF\n")[2].partition("\nEOF")[0])
        assert quota["metadata"]["namespace"] == "gpu-operator"
        assert problems(quota) == []


def test_utilisation_of_slices_is_measured() -> None:
    """T8: DCGM_FI_DEV_GPU_UTIL is not reported of them."""
    lines = [line.split(", ") for line in dcgm.csv().splitlines() if not line.startswith("#")]
    assert all(len(columns) == 3 for columns in lines)
    assert {kind for _, kind, _ in lines} <= {"gauge", "counter", "label"}
    names = [name for name, _, _ in lines]
    assert len(set(names)) == len(names)
    assert {"DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_FB_USED"} <= set(names)


TIME = """
pools: {dev: {hardware: L4, time_slicing: 4}}
models: {small: {weights: Qwen/Qwen2.5-7B-Instruct, pool: dev, engine: vllm%s}}
"""


def test_time_slicing_is_for_development_and_says_so() -> None:
    made = files(bundle(TIME % ""))
    assert "FOR DEVELOPMENT ONLY" in made["gpu-operator/development-only-4-pods.yaml"]
    assert "**Development only**" in made["gpu-operator/README.md"]
    config = values(TIME % "")["devicePlugin"]["config"]
    # only nodes that are labelled for it: nobody else's GPUs are shared by mistake
    assert config["default"] == "default"
    assert "sharing" not in yaml.safe_load(config["data"]["default"])
    shared = yaml.safe_load(config["data"]["development-only-4-pods"])["sharing"]["timeSlicing"]
    assert shared["resources"] == [{"name": "nvidia.com/gpu", "replicas": 4}]
    assert shared["failRequestsGreaterThanOne"] is True
    assert f"{sharing.LABEL}=development-only-4-pods" in made["gpu-operator/README.md"]


@pytest.mark.parametrize(
    ("more", "what"), [(", slo: {ttft_p95: 500ms}", "slo"), (", scale: {max: 1}", "scale")]
)
def test_nothing_that_promises_something_is_shared_in_time(more: str, what: str) -> None:
    with pytest.raises(StartupError, match=rf"models.small has {what}, and its pool dev is shared in time"):
        files(bundle(TIME % more))


def test_only_gpus_of_nvidias_are_shared_in_time() -> None:
    spec = Spec.model_validate({"pools": {"dev": {"hardware": "MI300X", "time_slicing": 2}}})
    with pytest.raises(StartupError, match=r"pools.dev.time_slicing: MI300X is no GPU of NVIDIA's"):
        sharing.configs(spec, mig_strategy="mixed")


def test_without_gpus_there_is_nothing_to_install() -> None:
    assert files(bundle(example())) == {}


def test_what_alerts_and_dashboards_ask_of_gpus_is_exported() -> None:
    made = formats.files(bundle(TOGETHER), "plain")
    asked = {
        name for path, text in made.items() if "/" not in path for name in re.findall(r"DCGM_FI_\w+", text)
    }
    assert "DCGM_FI_DEV_GPU_TEMP" in asked
    assert "DCGM_FI_PROF_GR_ENGINE_ACTIVE" in asked
    assert asked <= {field.name for field in dcgm.FIELDS}
