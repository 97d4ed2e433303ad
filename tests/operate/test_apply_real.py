"""`penstock apply` against a real API server with its scheduler and controllers (tests/operate/cluster.py).

There is no kubelet: what becomes of a pod is written into its status by the test, in a kubelet's words.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.cli.main import main

from .cluster import NAMES, Cluster, binaries

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(binaries() is None, reason=f"needs {', '.join(NAMES)} (PENSTOCK_TEST_KUBERNETES)"),
]
NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}
READY = {"type": "Ready", "status": "True"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    found.add_node("gpu-1", {"nvidia.com/gpu": "2"})
    yield found
    found.stop()


def deployment(name: str, *, replicas: int = 1, gpus: int = 1, namespace: str = "llm", **pod: Any) -> Any:
    container = {
        "name": "engine",
        "image": "penstock:1",
        "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [container], **pod},
            },
        },
    }


def apply(cluster: Cluster, folder: Path, objects: list[Any], *flags: str) -> int:
    folder.mkdir(exist_ok=True)
    # by names that sort the namespace last: order is penstock's
    for number, each in enumerate(objects):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(each))
    return main(
        [
            "apply",
            str(folder),
            "--kubeconfig",
            str(cluster.kubeconfig),
            "--no-check",
            "--poll",
            "200ms",
            *flags,
        ]
    )


def pods(cluster: Cluster, app: str) -> list[Any]:
    found: list[Any] = cluster.get("pods", "-n", "llm", "-l", f"app={app}")["items"]
    return found


def as_kubelet(cluster: Cluster, app: str, status: dict[str, Any]) -> threading.Thread:
    """Say so of each pod once it has a node."""

    def run() -> None:
        for _ in range(200):
            waiting = [
                pod for pod in pods(cluster, app)
                if pod["spec"].get("nodeName") and not pod["status"].get("containerStatuses")
            ]  # fmt: skip
            for pod in waiting:
                conditions = [*pod["status"].get("conditions", []), *status.get("conditions", [])]
                said = {**status, "conditions": conditions}
                cluster.patch_status(f"pods/{pod['metadata']['name']}", said, "llm")
            if waiting:
                return

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def running(**state: Any) -> dict[str, Any]:
    container = {
        "name": "engine",
        "image": "x",
        "imageID": "x",
        "ready": False,
        "restartCount": 0,
        "state": {},
    }
    return {"phase": "Running", "containerStatuses": [{**container, **state}]}


def test_all_is_ready(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kubelet = as_kubelet(
        cluster, "good", {**running(ready=True, state={"running": {}}), "conditions": [READY]}
    )
    assert apply(cluster, tmp_path / "b", [deployment("good", gpus=0), NAMESPACE], "--json") == 0
    kubelet.join()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ready"]
    assert "All 1 are ready" in captured.err
    managers = cluster.kubectl(
        "get", "deployment", "good", "-n", "llm", "-o", "json", "--show-managed-fields"
    )
    fields = json.loads(managers or "")["metadata"]["managedFields"]
    assert ("penstock", "Apply") in [(each["manager"], each["operation"]) for each in fields]
    # the same again changes nothing
    assert apply(cluster, tmp_path / "b", [deployment("good", gpus=0), NAMESPACE]) == 0
    assert cluster.get("deployment", "good", "-n", "llm")["metadata"]["generation"] == 1


def test_there_are_no_devices_left(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(cluster, tmp_path / "b", [NAMESPACE, deployment("big", gpus=4)], "--timeout", "5s") == 1
    said = capsys.readouterr().err
    assert "Pod llm/big-" in said
    assert "Insufficient nvidia.com/gpu" in said
    assert "No node has 4 of nvidia.com/gpu free" in said
    assert "1 of 1 are not ready within 5 s: Deployment llm/big" in said


@pytest.mark.parametrize(
    ("pod", "says"),
    [
        ({"nodeSelector": {"nvidia.com/gpu.product": "H100"}}, "No node has the labels that it selects"),
        (
            {"volumes": [{"name": "w", "persistentVolumeClaim": {"claimName": "weights"}}]},
            "the PersistentVolumeClaim weights is not there",
        ),
    ],
    ids=["selector", "claim"],
)
def test_no_node_takes_it(
    cluster: Cluster, tmp_path: Path, pod: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"held-{len(says)}"
    objects = [NAMESPACE, deployment(name, gpus=0, **pod)]
    assert apply(cluster, tmp_path / "b", objects, "--timeout", "5s") == 1
    assert says in capsys.readouterr().err


def test_a_claim_that_nothing_binds(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights-2", "namespace": "llm"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "50Gi"}}},
    }
    volumes = [{"name": "w", "persistentVolumeClaim": {"claimName": "weights-2"}}]
    objects = [NAMESPACE, claim, deployment("unbound", gpus=0, volumes=volumes)]
    assert apply(cluster, tmp_path / "b", objects, "--timeout", "8s") == 1
    said = capsys.readouterr().err
    assert "the PersistentVolumeClaim weights-2 is Pending" in said
    assert "no persistent volumes available for this claim and no storage class is set" in said
    assert "name one with `cluster.storage.storage_class`" in said


def test_a_quota_that_is_used_up(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "small"}}
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "gpus", "namespace": "small"},
        "spec": {"hard": {"requests.nvidia.com/gpu": "1"}},
    }
    # the quota's controller has to have counted before it says no by the cap
    assert apply(cluster, tmp_path / "q", [place, quota]) == 0
    end = 0
    while "hard" not in cluster.get("resourcequota", "gpus", "-n", "small").get("status", {}):
        end += 1
        assert end < 500
    assert (
        apply(cluster, tmp_path / "b", [deployment("two", gpus=2, namespace="small")], "--timeout", "5s") == 1
    )
    said = capsys.readouterr().err
    assert "exceeded quota: gpus, requested: requests.nvidia.com/gpu=2" in said
    assert "A ResourceQuota is used up" in said


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (
            running(
                state={"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x:1"'}}
            ),
            "engine: ImagePullBackOff",
        ),
        (
            running(
                restartCount=3,
                state={"waiting": {"reason": "CrashLoopBackOff"}},
                lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled", "containerID": "x"}},
            ),
            "engine was killed for memory (OOMKilled), 3 restarts",
        ),
        (
            running(
                restartCount=2,
                state={"waiting": {"reason": "CrashLoopBackOff"}},
                lastState={"terminated": {"exitCode": 1, "reason": "Error", "containerID": "x"}},
            ),
            "engine ends by itself, exit code 1, 2 restarts",
        ),
    ],
    ids=["image", "oom", "crash"],
)
def test_it_has_a_node_and_does_not_start(
    cluster: Cluster, tmp_path: Path, status: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"late-{len(says)}"
    kubelet = as_kubelet(cluster, name, status)
    assert apply(cluster, tmp_path / "b", [NAMESPACE, deployment(name, gpus=0)], "--timeout", "6s") == 1
    kubelet.join()
    assert says in capsys.readouterr().err


def test_its_progress_deadline_ends_the_wait(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = deployment("stuck", gpus=9)
    it["spec"]["progressDeadlineSeconds"] = 2
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it], "--timeout", "60s") == 1
    said = capsys.readouterr().err
    assert "its progressDeadlineSeconds are over" in said
    assert "are not ready after" in said


def test_somebody_else_has_set_it(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = deployment("shared", gpus=0)
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it], "--no-wait") == 0
    patch = json.dumps({"spec": {"replicas": 0}})
    words = (
        "patch",
        "deployment",
        "shared",
        "-n",
        "llm",
        "--type=merge",
        "--field-manager=hand",
        "-p",
        patch,
    )
    cluster.kubectl(*words)
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it], "--no-wait") == 2
    said = capsys.readouterr().err
    assert "conflict with" in said
    assert "take them over with --force-conflicts" in said
    assert cluster.get("deployment", "shared", "-n", "llm")["spec"]["replicas"] == 0
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it], "--no-wait", "--force-conflicts") == 0
    assert cluster.get("deployment", "shared", "-n", "llm")["spec"]["replicas"] == 1


def test_a_dry_run_keeps_nothing(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = deployment("dry", gpus=0)
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it], "--dry-run", "server") == 0
    assert cluster.kubectl("get", "deployment", "dry", "-n", "llm", check=False) is None
    it["spec"]["selector"]["matchLabels"] = {"app": "other"}
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it], "--dry-run", "server") == 2
    assert "selector" in capsys.readouterr().err


def test_a_kind_that_the_cluster_does_not_know(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "m", "namespace": "llm"},
    }
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "beside", "namespace": "llm"}}
    assert apply(cluster, tmp_path / "b", [NAMESPACE, it, other]) == 2
    said = capsys.readouterr().err
    assert "install what brings it (KEDA" in said
    kept = cluster.kubectl("get", "configmap", "beside", "-n", "llm", check=False) is not None
    assert kept == ("configmap/beside" in said.partition("Applied, and kept:")[2])
    assert "namespace/llm" in said
