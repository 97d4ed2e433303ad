"""Volumes of weights: their size, and who may write to them."""

from __future__ import annotations

from typing import Any

import pytest

from .bundle import Bundle, found, new_findings
from .finding import rules
from .test_mutations import argument, in_container, in_pod, on, put

_STORAGE = ("spec", "resources", "requests", "storage")


def _size(value: str, **more: Any) -> Any:
    def change(claim: Any) -> None:
        put(value, *_STORAGE)(claim)
        claim["spec"] |= more

    return on("PersistentVolumeClaim", "weights", change)


def test_a_claim_below_its_weights_is_found() -> None:
    (finding,) = new_findings("hub", _size("30Gi"))
    assert finding.rule.id == "volume-small"
    # 16.4 GB and 17.5 GB at 16 bits
    assert finding.what == "30Gi for Qwen/Qwen3-8B, Qwen/Qwen3-VL-8B-Instruct: 32 GiB of weights."
    assert finding.fix == "storage: 80Gi"


@pytest.mark.parametrize("value", ["32Gi", "34G", "1Ti"])
def test_a_claim_of_its_weights_is_right(value: str) -> None:
    assert not list(new_findings("hub", _size(value)))


@pytest.mark.parametrize(
    "more",
    [{"storageClassName": "efs-sc"}, {"storageClassName": "local-path"}, {"volumeName": "by-hand"}],
    ids=lambda each: next(iter(each)),
)
def test_a_size_that_nobody_keeps_to_is_left_alone(more: dict[str, str]) -> None:
    assert not list(new_findings("hub", _size("5Gi", **more)))


POD = """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers:
    - name: engine
      image: vllm/vllm-openai:v0.32.0
      args: [MODEL, --max-model-len=8192MORE]
      env: [{name: HF_HOME, value: /cache}]
      volumeMounts: [{name: cache, mountPath: /cache}]
  volumes:
    - name: cache
      VOLUME
"""
_LIMITED = "emptyDir: {sizeLimit: SIZE}"
_OWN = "ephemeral: {volumeClaimTemplate: {spec: {resources: {requests: {storage: SIZE}}}}}"


@pytest.mark.parametrize("volume", [_LIMITED, _OWN], ids=["emptyDir", "ephemeral"])
@pytest.mark.parametrize(("size", "small"), [("10Gi", True), ("20Gi", False)])
def test_a_cache_of_an_engine(volume: str, size: str, small: bool) -> None:
    text = POD.replace("VOLUME", volume.replace("SIZE", size)).replace("MODEL", "Qwen/Qwen3-8B")
    assert ("volume-small" in rules(text.replace("MORE", ""), "a.yaml")) is small


@pytest.mark.parametrize(
    ("model", "more"),
    [("acme/unknown-8B", ""), ("Qwen/Qwen3-8B", ", --load-format=dummy"), ("/models/a", "")],
)
def test_what_is_not_fetched_or_not_known_is_left_alone(model: str, more: str) -> None:
    text = POD.replace("VOLUME", _LIMITED.replace("SIZE", "1Gi")).replace("MODEL", model)
    assert "volume-small" not in rules(text.replace("MORE", more), "a.yaml")


def test_a_download_of_the_hub_s_own_program_counts() -> None:
    text = (
        POD.replace("VOLUME", _LIMITED.replace("SIZE", "10Gi"))
        .replace("MODEL", "/cache/a")
        .replace("MORE", "")
    )
    fetch = (
        "  initContainers:\n    - name: fetch\n      image: python:3.12\n"
        "      command: [hf, download, Qwen/Qwen3-8B, --local-dir, /cache/aPART]\n"
        "      volumeMounts: [{name: cache, mountPath: /cache}]\n  volumes:\n"
    )
    text = text.replace("  volumes:\n", fetch)
    assert "volume-small" in rules(text.replace("PART", ""), "a.yaml")
    assert "volume-small" not in rules(text.replace("PART", ", '--include=*.json'"), "a.yaml")


def _mount_writable(container: Any) -> None:
    for mount in container["volumeMounts"]:
        if mount["name"] == "weights":
            del mount["readOnly"]


def _open(pod: Any) -> None:
    _mount_writable(pod["containers"][0])
    for volume in pod["volumes"]:
        volume.get("persistentVolumeClaim", {}).pop("readOnly", None)


def test_weights_that_an_engine_may_write_are_a_note() -> None:
    (finding,) = new_findings("hub", in_pod("vision", _open))
    assert (finding.rule.id, finding.rule.severity.value) == ("weights-writable", "note")


def test_a_claim_that_is_read_only_keeps_its_mounts_so() -> None:
    assert not list(new_findings("hub", in_container("vision", _mount_writable)))


def test_a_folder_that_nobody_may_write_to_is_found() -> None:
    def change(container: Any) -> None:
        for mount in container["volumeMounts"]:
            if mount["name"] == "state":
                mount["readOnly"] = True

    (finding,) = new_findings("hub", in_container("gateway", change))
    assert finding.rule.id == "volume-never-written"


def _config_at(path: str | None) -> Any:
    def change(container: Any) -> None:
        mounts = container["volumeMounts"]
        (mount,) = [each for each in mounts if each["name"] == "config"]
        mount.update(mountPath=path) if path is not None else mounts.remove(mount)

    return in_container("gateway", change)


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(_config_at("/config"), id="mounted elsewhere"),
        pytest.param(_config_at(None), id="not mounted"),
        pytest.param(argument("gateway", "/etc/penstock/", "/srv/"), id="asked for elsewhere"),
    ],
)
def test_a_gateway_s_file_that_is_not_mounted_is_found(mutate: Any) -> None:
    assert "spec-unmounted" in {each.rule.id for each in new_findings("hub", mutate)}


def test_a_gateway_s_file_may_be_in_its_image() -> None:
    bundle = Bundle("hub")
    _config_at(None)(bundle)
    bundle.remove("ConfigMap", "gateway")
    assert "spec-unmounted" not in {each.rule.id for each in found(bundle.text())}


def test_a_priority_that_is_nowhere_is_a_note() -> None:
    (finding,) = new_findings("hub", in_pod("vision", put("serving", "priorityClassName")))
    assert (finding.rule.id, finding.what) == (
        "object-external",
        "PriorityClass serving is not among the objects.",
    )
    assert not list(new_findings("hub", in_pod("vision", put("system-node-critical", "priorityClassName"))))


def test_a_slip_in_a_priority_is_found() -> None:
    def change(bundle: Bundle) -> None:
        kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": 1000}
        bundle.objects.append({**kind, "metadata": {"name": "serving"}})
        bundle.pod("chat")["priorityClassName"] = "serving"
        bundle.pod("vision")["priorityClassName"] = "servng"

    assert [each.rule.id for each in new_findings("hub", change)] == ["reference-missing"]
