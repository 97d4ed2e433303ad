"""Labels by which pods choose nodes."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.check.nodes import products
from penstock.deploy.providers import PRODUCTS

from .bundle import new_findings
from .finding import of
from .test_mutations import in_container, in_pod, put

_NODES = (
    "affinity",
    "nodeAffinity",
    "requiredDuringSchedulingIgnoredDuringExecution",
    "nodeSelectorTerms",
    0,
)
_PRODUCT = (*_NODES, "matchExpressions", 0)


def _told(product: str) -> dict[str, str]:
    text = (
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec:\n  nodeSelector: {{nvidia.com/gpu.product: "
        f"'{product}'}}\n  containers: [{{name: a, image: 'a:1'}}]\n"
    )
    return {each.rule.id: each.what for each in of(text, "a.yaml") if each.rule.id.startswith("gpu-product")}


def test_what_we_write_is_in_the_table() -> None:
    assert {each for names in PRODUCTS.values() for each in names} <= products()


@pytest.mark.parametrize(
    ("product", "meant"),
    [
        ("NVIDIA-A100-SMX4-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("NVDIA-A100-SXM4-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("nvidia-h100-80gb-hbm3", "NVIDIA-H100-80GB-HBM3"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("NVIDIA-A100-SXM-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("NVIDIA-A100-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("NVIDIA-H100", "NVIDIA-H100-80GB-HBM3"),
        ("V100", "Tesla-V100-SXM2-32GB"),
        ("NVIDIA-L40s", "NVIDIA-L40S"),
        ("NVIDIA-A100-SMX4-80GB-MIG-3g.40gb", "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb"),
        ("NVIDIA-A100-SXM4-80G-SHARED", "NVIDIA-A100-SXM4-80GB-SHARED"),
    ],
)
def test_a_name_that_no_driver_writes_is_found(product: str, meant: str) -> None:
    told = _told(product)
    assert set(told) == {"gpu-product"}
    assert meant in told["gpu-product"]


@pytest.mark.parametrize(
    "product",
    [
        "NVIDIA-A100-SXM4-80GB",
        "A100-SXM4-80GB",
        "Tesla-T4",
        "NVIDIA-H200",
        "NVIDIA-L4-SHARED",
        "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb",
        "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb.me",
        "NVIDIA-A100-SXM4-80GB-MIG-1c.3g.40gb-SHARED",
        "NVIDIA-A100-SXM4-40GB-MIG-INVALID",
        "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
        "NVIDIA-RTX-2000-Ada-Generation-SHARED",
        "GRID-A100D-80C",
        "NVIDIA-L40S-48Q",
        "${GPU}",
    ],
)
def test_a_name_that_there_is_is_left_alone(product: str) -> None:
    assert _told(product) == {}


@pytest.mark.parametrize(
    "product",
    [
        # one letter or number from a product that is known, and it may be one that is not
        "NVIDIA-R200",
        "NVIDIA-H400-NVL",
        "NVIDIA-A100-SXM4-160GB",
        "NVIDIA-H100-SXM5-80GB-SIMULATED",
        "NVIDIA-GeForce-RTX-3080-Laptop-GPU",
        "NVIDIA-GeForce-RTX-6090",
        "Orin-(nvgpu)",
    ],
)
def test_what_may_be_a_product_is_a_note(product: str) -> None:
    assert set(_told(product)) == {"gpu-product-unlisted"}


def test_a_product_of_an_affinity_is_read() -> None:
    mutate = in_pod("vision", put("NVIDIA-A100-SMX4-80GB", *_PRODUCT, "values", 0))
    (finding,) = new_findings("hub", mutate)
    assert finding.rule.id == "gpu-product"
    assert finding.fix == "nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("where", "label", "meant"),
    [
        (("topologySpreadConstraints", 0, "topologyKey"), "topology.kubernetes.io/zones", "zone"),
        (("topologySpreadConstraints", 0, "topologyKey"), "topolgy.kubernetes.io/zone", "zone"),
        ((*_PRODUCT, "key"), "nvidia.com/gpu.prodcut", "gpu.product"),
    ],
)
def test_a_slip_in_a_label_is_found(where: tuple[str | int, ...], label: str, meant: str) -> None:
    new = list(new_findings("hub", in_pod("vision", put(label, *where))))
    assert "node-label" in {each.rule.id for each in new}
    assert any(each.fix.endswith(f"/{meant}.") for each in new)


@pytest.mark.parametrize(("key", "found"), [("nvidia.com/gpus", True), ("nvidia.com/gpu-dev", False)])
def test_a_slip_in_a_taint_is_found(key: str, found: bool) -> None:
    new = {each.rule.id for each in new_findings("hub", in_pod("vision", put(key, "tolerations", 0, "key")))}
    assert new == ({"node-label"} if found else set())


def _without_device(container: Any) -> None:
    for field in ("limits", "requests"):
        del container["resources"][field]["nvidia.com/gpu"]


def test_an_engine_that_asks_for_no_device_is_found() -> None:
    (finding,) = new_findings("hub", in_container("vision", _without_device))
    assert finding.rule.id == "device-missing"


def test_a_device_may_be_claimed_or_have_another_name() -> None:
    def claimed(pod: Any) -> None:
        _without_device(pod["containers"][0])
        pod["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": "gpu"}]

    def other(container: Any) -> None:
        _without_device(container)
        container["resources"]["limits"]["example.com/share-of-a-gpu"] = "1"

    for mutate in (in_pod("vision", claimed), in_container("vision", other)):
        assert "device-missing" not in {each.rule.id for each in new_findings("hub", mutate)}


@pytest.mark.parametrize(
    "label",
    [
        "topology.kubernetes.io/rack",
        "topology.kubevirt.io/zone",
        "topology.disk.csi.azure.com/zone",
        "failure-domain.beta.kubernetes.io/zone",
        "node.kubernetes.io/instance-types-of-ours",
        "nvidia.com/gpu.deploy.dcgm-dra",
        "nvidia.com/vgpu.config",
        "example.com/zone",
        "zones",
    ],
)
def test_a_label_of_ones_own_is_left_alone(label: str) -> None:
    where = ("topologySpreadConstraints", 0, "topologyKey")
    assert not list(new_findings("hub", in_pod("vision", put(label, *where))))
