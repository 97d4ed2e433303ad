"""Why pods do not start, on objects recorded from a real API server; and the command, with a kubectl that
answers as one.

recorded/objects.jsonl is what kube-apiserver, kube-scheduler and kube-controller-manager 1.20 had of
Deployments that cannot start (tests/operate/cluster.py); what a kubelet would have said of three is in their
status.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.operate.apply import bundle
from penstock.operate.apply.reasons import Reason, World, why
from penstock.operate.apply.rollout import standing

RECORDED = [
    json.loads(line)
    for line in (Path(__file__).parent / "recorded" / "objects.jsonl").read_text().splitlines()
]


def world(objects: list[Any]) -> World:
    def of(*kinds: str) -> list[Any]:
        return [each for each in objects if each["kind"] in kinds]

    return World(
        pods=of("Pod"), events=of("Event"), claims=of("PersistentVolumeClaim"), owners=of("ReplicaSet")
    )


def deployment(name: str) -> Any:
    return next(each for each in RECORDED if each["kind"] == "Deployment" and bundle.name(each) == name)


@pytest.mark.parametrize(
    ("name", "id", "what", "advice"),
    [
        ("gpus", "gpus", "1 Insufficient nvidia.com/gpu", "No node has 4 of nvidia.com/gpu free"),
        ("taint", "gpus", "had taint {sku: gpu}", "name it under `pools.*.nodes.taints`"),
        ("mig", "gpus", "Insufficient nvidia.com/mig-3g.40gb", "not cut into such slices"),
        ("selector", "selector", "didn't match Pod's node affinity", "pools.*.nodes.labels"),
        ("memory", "resources", "Insufficient memory", "a larger instance type"),
        ("pvc", "pvc", "weights is Pending: no persistent volumes", "cluster.storage.storage_class"),
        ("pvc-class", "pvc", 'storageclass.storage.k8s.io "nfs" not found', "kubectl get storageclass"),
        ("pvc-missing", "pvc", "the PersistentVolumeClaim nowhere is not there", "correct the claim's name"),
        (
            "quota",
            "quota",
            "exceeded quota: gpus, requested: requests.nvidia.com/gpu=2",
            "raise it, or lower",
        ),
        ("image", "image", "Back-off pulling image", "can"),
        ("oom", "oom", "killed for memory (OOMKilled), 3 restarts", "memory limit"),
        ("crash", "crash", "ends by itself, exit code 1, 2 restarts", "--previous"),
    ],
)
def test_reasons_of_a_real_cluster(name: str, id: str, what: str, advice: str) -> None:
    it = deployment(name)
    assert not standing(it).ready
    (reason,) = why(it, world(RECORDED))
    assert reason.id == id
    assert what in reason.what
    assert advice in reason.advice
    assert reason.pods == (2 if name == "gpus" else 1)  # two pods, one reason


# ---- what kubelets say ----


def pod(container: dict[str, Any], events: list[tuple[str, str]] = (), **status: Any) -> Reason | None:  # type: ignore[assignment]
    it = {
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "llm", "uid": "1", "labels": {"a": "b"}},
        "status": {"containerStatuses": [{"name": "engine", "restartCount": 0, **container}], **status},
    }
    said = [
        {
            "metadata": {"name": str(number)},
            "involvedObject": {"uid": "1", "kind": "Pod"},
            "reason": reason,
            "message": message,
            "lastTimestamp": f"2026-11-22T00:00:{59 - number:02}Z",
        }
        for number, (reason, message) in enumerate(events)
    ]
    owner = {
        "kind": "Deployment",
        "metadata": {"name": "d", "uid": "2"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}},
    }
    found = why(owner, World(pods=[it], events=said))
    return found[0] if found else None


@pytest.mark.parametrize(
    ("container", "events", "id", "advice"),
    [
        (
            {"state": {"waiting": {"reason": "ErrImagePull", "message": "x"}}},
            [("Failed", 'Failed to pull image "a/b:1": rpc error: code = NotFound desc = a/b:1: not found')],
            "image",
            "There is no such image",
        ),
        (
            {"state": {"waiting": {"reason": "ImagePullBackOff"}}},
            [("Failed", "failed to authorize: failed to fetch oauth token: 401 Unauthorized, to pull image")],
            "image",
            "cluster.images.pull_secret",
        ),
        (
            {
                "state": {
                    "waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}
                }
            },
            [],
            "config",
            "cluster.secret",
        ),
        (
            {"state": {"running": {}}, "ready": False},
            [("Unhealthy", "Startup probe failed: HTTP probe failed with statuscode: 503")],
            "probe",
            "cluster.load_time",
        ),
        (
            {"state": {"running": {}}, "ready": False},
            [("Unhealthy", "Readiness probe failed: Get http://10.0.0.1:8000/readyz: connection refused")],
            "probe",
            "It may be loading still",
        ),
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "restartCount": 4,
                "lastState": {"terminated": {"exitCode": 137, "reason": "Error"}},
            },
            [("Killing", "Container engine failed startup probe, will be restarted")],
            "probe",
            "cluster.load_time",
        ),
        (
            {"state": {"waiting": {"reason": "ContainerCreating"}}},
            [("FailedMount", 'MountVolume.SetUp failed for volume "tls" : secret "tls" not found')],
            "mount",
            "Make it, or correct its name",
        ),
        (
            {"state": {"terminated": {"exitCode": 1, "reason": "Error"}}},
            [],
            "crash",
            "kubectl logs p -c engine",
        ),
    ],
)
def test_what_kubelets_say(container: Any, events: Any, id: str, advice: str) -> None:
    reason = pod(container, events)
    assert reason is not None
    assert reason.id == id
    assert advice in reason.advice


def test_a_pod_that_only_needs_time_has_no_reason() -> None:
    assert pod({"state": {"waiting": {"reason": "ContainerCreating"}}}) is None
    assert pod({"state": {"running": {}}, "ready": False}) is None
    ready = [{"type": "Ready", "status": "True"}]
    unhealthy = [("Unhealthy", "Readiness probe failed: 503")]  # while it started
    assert pod({"state": {"running": {}}, "ready": True}, unhealthy, conditions=ready) is None


def test_an_evicted_pod() -> None:
    reason = pod({}, phase="Failed", reason="Evicted", message="The node was low on resource: memory.")
    assert reason is not None
    assert (reason.id, reason.what) == ("evicted", "Evicted: The node was low on resource: memory.")


# ---- readiness ----


def made(kind: str, spec: dict[str, Any], status: dict[str, Any]) -> Any:
    return {"kind": kind, "metadata": {"name": "x", "generation": 2}, "spec": spec, "status": status}


_SEEN = {"observedGeneration": 2}
_NEW = {**_SEEN, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}
_LATE = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]


@pytest.mark.parametrize(
    ("it", "ready", "failed"),
    [
        (made("Deployment", {"replicas": 2}, _NEW), True, False),
        (made("Deployment", {"replicas": 2}, {**_NEW, "observedGeneration": 1}), False, False),
        (made("Deployment", {"replicas": 2}, {**_NEW, "updatedReplicas": 1}), False, False),
        (made("Deployment", {"replicas": 2}, {**_NEW, "replicas": 3}), False, False),
        (made("Deployment", {"replicas": 2}, {**_SEEN, "conditions": _LATE}), False, True),
        (made("Deployment", {"replicas": 0}, _SEEN), True, False),
        (made("Deployment", {}, {}), False, False),
        (made("StatefulSet", {"replicas": 1}, {**_SEEN, "readyReplicas": 1}), True, False),
        (
            made(
                "StatefulSet",
                {"replicas": 1},
                {**_SEEN, "readyReplicas": 1, "currentRevision": "a", "updateRevision": "b"},
            ),
            False,
            False,
        ),
        (made("DaemonSet", {}, {**_SEEN, "desiredNumberScheduled": 2, "numberAvailable": 1}), False, False),
        (made("LeaderWorkerSet", {"replicas": 1}, {"readyReplicas": 1, "updatedReplicas": 1}), True, False),
        (made("LeaderWorkerSet", {"replicas": 1}, {}), False, False),
        (made("Job", {}, {"conditions": [{"type": "Complete", "status": "True"}]}), True, False),
        (
            made(
                "Job",
                {},
                {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]},
            ),
            False,
            True,
        ),
        (made("Job", {}, {"active": 1}), False, False),
    ],
)
def test_readiness(it: Any, ready: bool, failed: bool) -> None:
    found = standing(it)
    assert (found.ready, found.failed) == (ready, failed)


# ---- the command, with a kubectl that answers as one ----

KUBECTL = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
answers = json.loads((here / "answers.json").read_text())
while words and words[0].startswith("-"):
    words = words[2:]
if words[0] == "apply":
    items = json.load(sys.stdin)["items"]
    if words[0] in answers["errors"]:
        sys.exit(answers["errors"][words[0]])
    for it in items:
        print(it["kind"].lower() + "/" + it["metadata"]["name"] + " serverside-applied")
elif words[0] == "get":
    if words[0] in answers["errors"]:
        sys.exit(answers["errors"][words[0]])
    looks = len((here / "calls").read_text().splitlines())
    after = answers["ready_after"]
    name = "ready" if after is not None and looks > after else "objects"
    kinds = {{each.split(".")[0].rstrip("s") for each in words[1].split(",")}}
    print(json.dumps({{"items": [each for each in answers[name] if each["kind"].lower() in kinds]}}))
elif words[0] == "logs":
    print(answers["log"])
elif words[0] == "kustomize":
    print((pathlib.Path(words[1]) / "rendered.yaml").read_text())
"""


class Fake:
    """A kubectl in a folder."""

    def __init__(self, folder: Path, **answers: Any) -> None:
        folder.mkdir()
        self.path = folder / "kubectl"
        self.path.write_text(KUBECTL.format(python=sys.executable))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        given = {"errors": {}, "objects": [], "ready": [], "ready_after": None, "log": "", **answers}
        (folder / "answers.json").write_text(json.dumps(given))

    @property
    def calls(self) -> list[list[str]]:
        path = self.path.parent / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bundle_of(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        it = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": "llm"},
            "spec": {},
        }
        (folder / f"a-{name}.yaml").write_text(yaml.safe_dump(it))
    place = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}
    (folder / "z.yaml").write_text(yaml.safe_dump(place))
    return folder


def apply(kubectl: Fake, folder: Path, *flags: str) -> int:
    return main(["apply", str(folder), "--kubectl", str(kubectl.path), "--no-check", "--poll", "0s", *flags])


Captured = pytest.CaptureFixture[str]


def test_what_is_applied_and_how(tmp_path: Path, capsys: Captured) -> None:
    fake = Fake(tmp_path / "k")
    assert apply(fake, bundle_of(tmp_path / "b", "m"), "--no-wait", "--context", "prod", "-n", "x") == 0
    assert capsys.readouterr().err.splitlines() == [
        "namespace/llm serverside-applied", "deployment/m serverside-applied",
    ]  # fmt: skip
    first, second = fake.calls
    assert first == second
    assert first[:6] == ["--context", "prod", "--namespace", "x", "apply", "--server-side"]
    assert "--field-manager=penstock" in first
    assert apply(fake, tmp_path / "b", "--dry-run", "server", "--force-conflicts") == 0
    assert {"--dry-run=server", "--force-conflicts"} <= set(fake.calls[-1])
    count = len(fake.calls)
    assert apply(fake, tmp_path / "b", "--dry-run", "client") == 0
    assert len(fake.calls) == count  # nothing has left this machine
    assert "Namespace llm (dry run)" in capsys.readouterr().err


def test_it_waits_until_all_is_ready_and_says_why_not_meanwhile(tmp_path: Path, capsys: Captured) -> None:
    late = [each for each in RECORDED if each["metadata"].get("namespace") == "llm"]
    ready = json.loads(json.dumps(deployment("gpus")))
    ready["status"] |= {"updatedReplicas": 2, "availableReplicas": 2, "replicas": 2}
    fake = Fake(tmp_path / "k", objects=late, ready=[ready], ready_after=6)
    assert apply(fake, bundle_of(tmp_path / "b", "gpus"), "--timeout", "60s", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.count("No node has 4 of nvidia.com/gpu free") == 1  # once, however often it looks
    assert "(and 1 more)" in captured.err
    assert json.loads(captured.out)["ready"]


def test_what_a_crashed_container_said_is_looked_up(tmp_path: Path, capsys: Captured) -> None:
    log = "INFO loading\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB\n"
    fake = Fake(tmp_path / "k", objects=RECORDED, log=log)
    assert apply(fake, bundle_of(tmp_path / "b", "crash"), "--timeout", "0s", "--json") == 1
    captured = capsys.readouterr()
    assert "Its log: CUDA out of memory." in captured.err
    (reason,) = json.loads(captured.out)["reasons"]
    assert reason["id"] == "crash"
    assert {"logs", "-c", "engine", "--previous"} <= set(fake.calls[-1])


def test_penstock_check_comes_first(tmp_path: Path, capsys: Captured) -> None:
    fake = Fake(tmp_path / "k")
    folder = bundle_of(tmp_path / "b", "m")  # a Deployment without a selector
    assert main(["apply", str(folder), "--kubectl", str(fake.path)]) == 2
    assert "`penstock check` has found" in capsys.readouterr().err
    assert fake.calls == []


def test_folders_within_are_left_out(tmp_path: Path, capsys: Captured) -> None:
    """As kubectl does it; a bundle's have values for charts of others."""
    folder = bundle_of(tmp_path / "b", "m")
    (folder / "gpu-operator").mkdir()
    (folder / "gpu-operator" / "values.yaml").write_text("driver: {enabled: false}\n")
    assert len(bundle.read([folder])) == 2
    assert apply(Fake(tmp_path / "k"), folder, "-R") == 2
    assert "values.yaml has a document that is no Kubernetes object" in capsys.readouterr().err


def test_what_is_compiled_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert main(["compile", "penstock.yaml", "-o", "bundle"]) == 0
    first, rest = bundle.stages(bundle.read([tmp_path / "bundle"]))
    assert [each["kind"] for each in first] == ["Namespace"]
    assert {"Deployment", "Service", "ConfigMap"} <= {each["kind"] for each in rest}


def test_kustomize_is_kubectls(tmp_path: Path) -> None:
    fake = Fake(tmp_path / "k")
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text("resources: [x.yaml]\n")
    it = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    (folder / "rendered.yaml").write_text(yaml.safe_dump(it))
    assert apply(fake, folder) == 0
    assert [call[0] for call in fake.calls] == ["kustomize", "apply"]


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        (
            {"apply": "The connection to the server localhost:8080 was refused"},
            "kubectl config current-context",
        ),
        (
            {"apply": 'error: Apply failed with 1 conflict: conflict with "hpa": .spec.replicas'},
            "--force-conflicts",
        ),
        ({"apply": 'error: no matches for kind "ScaledObject" in version "keda.sh/v1alpha1"'}, "KEDA"),
        ({"get": "Error from server (Forbidden): pods is forbidden"}, "kubectl auth can-i"),
    ],
)
def test_what_a_cluster_refuses(tmp_path: Path, errors: Any, says: str, capsys: Captured) -> None:
    fake = Fake(tmp_path / "k", errors=errors)
    assert apply(fake, bundle_of(tmp_path / "b", "m")) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "There are no Kubernetes objects"),
        ({"a.yaml": "a: [1"}, "a.yaml:1 is not valid YAML"),
        ({"a.yaml": "- 1"}, "no Kubernetes object"),
        ({"penstock.yaml": "models: {}"}, "no Kubernetes object"),
        ({"a.yaml": "apiVersion: v1\nkind: Pod"}, "without metadata.name"),
        ({"Chart.yaml": "name: x"}, "helm upgrade --install"),
        (
            {
                "a.yaml": "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {}}",
                "b.yaml": "{apiVersion: v1, kind: Pod, metadata: {name: x}}",
            },
            "Pod x is there twice, and not the same",
        ),
    ],
)
def test_what_is_no_bundle(tmp_path: Path, files: dict[str, str], says: str, capsys: Captured) -> None:
    fake = Fake(tmp_path / "k")
    folder = tmp_path / "b"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert apply(fake, folder) == 2
    assert says in capsys.readouterr().err
    assert not any("apply" in call for call in fake.calls)


def test_without_kubectl(tmp_path: Path, capsys: Captured) -> None:
    folder = bundle_of(tmp_path / "b", "m")
    assert main(["apply", str(folder), "--no-check", "--kubectl", "no-such-kubectl"]) == 2
    assert "There is no no-such-kubectl here" in capsys.readouterr().err
    with pytest.raises(StartupError, match="does not exist"):
        bundle.read([tmp_path / "nowhere"])
