"""Why something is not ready: what the API server has of its pods, events and claims, in words. Pure.

Reasons and messages are Kubernetes' own (kubelet, scheduler, controllers); what to do names fields of
penstock.yaml where there are some.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .bundle import Object, name, title
from .rollout import condition

_LONGEST = 400


@dataclass(frozen=True, slots=True)
class Reason:
    """One."""

    object: str
    """Whose it is."""
    id: str
    """As `gpus`, `image`, `oom`: for scripts."""
    what: str
    advice: str
    pods: int = 1
    """How many have the same."""


@dataclass(frozen=True, slots=True)
class World:
    """What there is in a namespace."""

    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    claims: Sequence[Object] = ()
    owners: Sequence[Object] = ()
    """ReplicaSets, and what else stands between a workload and its pods."""

    def of(self, it: Object) -> list[Mapping[str, Any]]:
        """Events of an object, newest first."""
        uid, kind = it["metadata"].get("uid"), it["kind"]
        found = []
        for event in self.events:
            about = event.get("involvedObject") or event.get("regarding") or {}
            same = about.get("uid") == uid if uid and about.get("uid") else about.get("name") == name(it)
            if same and about.get("kind", kind) == kind:
                found.append(event)
        return sorted(found, key=_when, reverse=True)

    def pods_of(self, it: Object) -> list[Object]:
        """Pods that a workload's selector takes."""
        selector = (it.get("spec") or {}).get("selector") or {}
        wanted = selector.get("matchLabels") or {}
        if it["kind"] == "LeaderWorkerSet":
            wanted = {"leaderworkerset.sigs.k8s.io/name": name(it)}
        if not wanted:
            return []
        return [
            pod
            for pod in self.pods
            if wanted.items() <= (pod["metadata"].get("labels") or {}).items()
            and not pod["metadata"].get("deletionTimestamp")
        ]

    def owned_by(self, it: Object) -> list[Object]:
        """What a workload owns itself."""
        uid = it["metadata"].get("uid")
        return [
            each
            for each in self.owners
            if any(owner.get("uid") == uid for owner in each["metadata"].get("ownerReferences") or ())
        ]


def why(it: Object, world: World) -> list[Reason]:
    """Why a workload is not ready, each reason once."""
    found: dict[tuple[str, str], Reason] = {}
    for reason in _all(it, world):
        key = (reason.id, reason.what)
        before = found.get(key)
        if before is None:
            found[key] = reason
        elif reason.object != before.object:
            found[key] = replace(before, pods=before.pods + 1)
    return list(found.values())


def _all(it: Object, world: World) -> Iterator[Reason]:
    pods = [pod for pod in world.pods_of(it) if not _ready(pod)]
    for pod in pods:
        reason = of_pod(pod, world)
        if reason is not None:
            yield reason
    for each in (it, *world.owned_by(it)):
        # what could not even be made
        failure = condition(each.get("status") or {}, "ReplicaFailure")
        if failure.get("status") == "True":
            yield _uncreated(title(it), str(failure.get("message", "")))
        elif not pods:
            for event in world.of(each):
                if event.get("reason") in ("FailedCreate", "FailedCreatePodSandBox"):
                    yield _uncreated(title(it), str(event.get("message", "")))
                    break


def of_pod(pod: Object, world: World) -> Reason | None:
    """The first thing that keeps a pod from being ready; None where it only needs time."""
    status = pod.get("status") or {}
    events = world.of(pod)
    if status.get("reason") == "Evicted" or (status.get("phase") == "Failed" and status.get("reason")):
        advice = "The node ran short of it: give the pod the memory or ephemeral storage that it takes."
        return _reason(pod, "evicted", f"{status.get('reason')}: {status.get('message', '')}", advice)
    scheduled = condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return _unscheduled(pod, str(scheduled.get("message", "")), world)
    states = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in states:
        if (reason := _of_container(pod, container, events)) is not None:
            return reason
    for event in events:
        if event.get("reason") in _MOUNTS:
            return _reason(pod, "mount", _message(event), _mount_advice(_message(event)))
        if event.get("reason") == "FailedCreatePodSandBox":
            advice = "The node's network or container runtime fails: look at the node."
            return _reason(pod, "sandbox", _message(event), advice)
    return None


def _of_container(
    pod: Object, container: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> Reason | None:
    state = container.get("state") or {}
    waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
    last = (container.get("lastState") or {}).get("terminated") or {}
    which, restarts = container.get("name", ""), container.get("restartCount", 0)
    reason = str(waiting.get("reason", ""))
    died = ended if ended.get("exitCode") else last
    if reason in _IMAGES:
        said = next((_message(each) for each in events if "pull" in _message(each).lower()), "")
        what = f"{which}: {reason}: {said or waiting.get('message') or container.get('image', '')}"
        return _reason(pod, "image", what, _image_advice(what))
    if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        said = str(waiting.get("message", ""))
        advice = "Make it, or correct its name: `cluster.secret` and its like in penstock.yaml name Secrets."
        if "runAsNonRoot" in said:
            advice = "The image runs as root: use one that does not, or set runAsUser."
        return _reason(pod, "config", f"{which}: {said or reason}", advice)
    if died.get("reason") == "OOMKilled" or (
        died.get("exitCode") == 137 and died.get("reason") != "Completed"
    ):
        what = f"{which} was killed for memory (OOMKilled), {restarts} restarts"
        if died.get("reason") != "OOMKilled":
            what = f"{which} was killed (exit code 137), {restarts} restarts"
        killed = next((each for each in events if each.get("reason") == "Killing"), None)
        if killed is not None and "probe" in _message(killed) and died.get("reason") != "OOMKilled":
            return _probe(pod, which, killed)
        advice = (
            "Loading takes the weights' size of main memory: raise the container's memory limit, or quantise "
            "what it loads."
        )
        return _reason(pod, "oom", what, advice)
    probe = next(
        (
            each
            for each in events
            if each.get("reason") in ("Unhealthy", "Killing") and "probe" in _message(each)
        ),
        None,
    )
    if (
        probe is not None
        and (restarts or not container.get("ready"))
        and not ended
        and "CrashLoop" not in reason
    ):
        return _probe(pod, which, probe)
    if reason == "CrashLoopBackOff" or (died and restarts):
        if probe is not None and str(probe.get("reason")) == "Killing":
            return _probe(pod, which, probe)
        what = f"{which} ends by itself, exit code {died.get('exitCode', '?')}, {restarts} restarts"
        said = str(died.get("message", "")).strip()
        if said:
            what += f": {said}"
        return _reason(
            pod, "crash", what, f"Its log says why: kubectl logs {name(pod)} -c {which} --previous"
        )
    if ended.get("exitCode"):
        what = f"{which} has ended with exit code {ended['exitCode']}"
        return _reason(pod, "crash", what, f"Its log says why: kubectl logs {name(pod)} -c {which}")
    return None


def _probe(pod: Object, container: str, event: Mapping[str, Any]) -> Reason:
    said = _message(event)
    if "artup" in said:
        advice = "Loading takes longer than its startupProbe waits: raise `cluster.load_time`."
    elif "iveness" in said:
        advice = "It was restarted because it did not answer: look into its log, and at the probe's time-out."
    else:
        advice = "It may be loading still. If this stays: does it listen on that port and path?"
    return _reason(pod, "probe", f"{container}: {said}", advice)


# ---- what cannot be scheduled ----


def _unscheduled(pod: Object, message: str, world: World) -> Reason:
    """The scheduler's words, after what they mean for whom."""
    said = " ".join(message.split())
    for resource in re.findall(r"Insufficient ([\w.\-/]*[\w/])", said):
        if "/" in resource:  # nvidia.com/gpu, nvidia.com/mig-3g.40gb, amd.com/gpu
            asked = _asked(pod, resource)
            advice = (
                f"No node has {asked} of {resource} free: add nodes to the pool, end what else has them, or "
                "lower `replicas` or `devices`. `kubectl describe nodes` shows what is allocated; where it "
                "shows none of them, the device plugin does not run"
            )
            advice += ", or devices are not cut into such slices." if "mig-" in resource else "."
            if re.search(_TAINT, said):  # nodes with devices are often those with a taint
                advice += f" Or those with a taint have them: {_TAINT_ADVICE}"
            return _reason(pod, "gpus", said, advice)
    if "persistentvolumeclaim" in said.lower():
        return _claim(pod, said, world)
    for pattern, id, advice in _SCHEDULING:
        if re.search(pattern, said):
            return _reason(pod, id, said, advice)
    return _reason(pod, "unschedulable", said or "no node takes it", "`kubectl describe pod` says more.")


def _asked(pod: Object, resource: str) -> str:
    """How many of a resource a pod wants."""
    total = 0
    for container in (pod.get("spec") or {}).get("containers") or ():
        resources = container.get("resources") or {}
        value = (resources.get("requests") or {}).get(resource) or (resources.get("limits") or {}).get(
            resource
        )
        total += int(str(value)) if str(value).isdigit() else 0
    return str(total) if total else "enough"


def _claim(pod: Object, said: str, world: World) -> Reason:
    """A pod that waits for its volume: the claim's events say why."""
    volumes = (pod.get("spec") or {}).get("volumes") or ()
    names = {(each.get("persistentVolumeClaim") or {}).get("claimName") for each in volumes}
    claims = {name(each): each for each in world.claims}
    for claim in sorted(filter(None, names)):
        found = claims.get(claim)
        if found is None:
            advice = "Apply it, or correct the claim's name in the pod."
            return _reason(pod, "pvc", f"the PersistentVolumeClaim {claim} is not there", advice)
        if (found.get("status") or {}).get("phase") != "Bound":
            events = world.of(found)
            told = _message(events[0]) if events else "nothing has been said of it yet"
            return _reason(
                pod, "pvc", f"the PersistentVolumeClaim {claim} is Pending: {told}", _pvc_advice(told)
            )
    return _reason(pod, "pvc", said, "`kubectl describe pvc` says more.")


def _pvc_advice(told: str) -> str:
    if "no storage class is set" in told:
        return "The cluster has no default StorageClass: name one with `cluster.storage.storage_class`."
    if re.search(r"storageclass.* not found", told):
        return "Correct `cluster.storage.storage_class`: `kubectl get storageclass` lists what there is."
    if "waiting for first consumer" in told:
        return "It is made when its pod has a node: look at why the pod has none."
    if "access mode" in told.lower() or "ReadWriteMany" in told:
        return "That class cannot be mounted by several nodes: another class, or `cluster.storage.access`."
    return "Its provisioner says more: `kubectl describe pvc`."


_TAINT = r"(had|has) (untolerated )?taint|didn't tolerate"
_TAINT_ADVICE = "name it under `pools.*.nodes.taints`."
_SCHEDULING = (
    (
        r"Insufficient (memory|cpu|ephemeral-storage|pods)",
        "resources",
        "No node has as much left: a larger instance type, or smaller requests.",
    ),
    (
        r"didn't match (Pod's )?node (affinity|selector)",
        "selector",
        "No node has the labels that it selects: compare `pools.*.nodes.labels` and `cluster.provider` with "
        "`kubectl get nodes --show-labels`.",
    ),
    (_TAINT, "taint", f"Nodes have a taint that the pod does not tolerate: {_TAINT_ADVICE}"),
    (
        r"didn't match pod (anti-)?affinity|topology spread",
        "spread",
        "Its replicas shall not share a node or zone, and no other one is free.",
    ),
    (r"(unschedulable|were unschedulable)", "cordoned", "Nodes are cordoned: `kubectl uncordon NODE`."),
    (r"volume node affinity conflict", "zone", "Its volume is in another zone than the free nodes."),
)

# ---- what cannot be created, pulled or mounted ----

_IMAGES = frozenset(
    "ErrImagePull ImagePullBackOff InvalidImageName ErrImageNeverPull RegistryUnavailable "
    "ImageInspectError".split()
)
_MOUNTS = frozenset({"FailedMount", "FailedAttachVolume"})


def _uncreated(object: str, said: str) -> Reason:
    # each try is another pod's
    said = re.sub(r'^.*pods "[^"]*" is forbidden: ', "", " ".join(said.split()))[:_LONGEST]
    if "exceeded quota" in said:
        advice = "A ResourceQuota is used up (`kubectl describe quota`): raise it, or lower `replicas`."
        return Reason(object, "quota", said, advice)
    if "PodSecurity" in said:
        advice = "The namespace's Pod Security level forbids the pod: change the pod, or the level."
        return Reason(object, "pod-security", said, advice)
    if "serviceaccount" in said.lower():
        return Reason(object, "service-account", said, "Apply its ServiceAccount, too.")
    return Reason(
        object, "create", said, "Its pods cannot be made: an admission rule of the cluster refuses them."
    )


def _image_advice(said: str) -> str:
    low = said.lower()
    if any(
        word in low
        for word in ("unauthorized", "authentication required", "denied", "forbidden", "401", "403")
    ):
        return "The registry wants credentials: `cluster.images.pull_secret` names the Secret that has them."
    if any(word in low for word in ("not found", "manifest unknown", "does not exist", "404")):
        return "There is no such image: correct `cluster.images`, or push it."
    if "invalidimagename" in low:
        return "The image's name is none: correct `cluster.images`."
    if any(word in low for word in ("toomanyrequests", "429", "rate limit")):
        return "The registry limits how often one may pull: use a mirror, or credentials."
    return "The node cannot pull it: is the registry reached from there?"


def _mount_advice(said: str) -> str:
    if re.search(r"(secret|configmap) \".*\" not found", said):
        return "Make it, or correct its name."
    return "The volume cannot be mounted on that node: `kubectl describe pod` says more."


def _reason(pod: Object, id: str, what: str, advice: str) -> Reason:
    return Reason(title(pod), id, " ".join(what.split())[:_LONGEST], advice)


def _ready(pod: Object) -> bool:
    status = pod.get("status") or {}
    return status.get("phase") == "Succeeded" or condition(status, "Ready").get("status") == "True"


def _message(event: Mapping[str, Any]) -> str:
    return " ".join(str(event.get("message") or event.get("note") or "").split())


def _when(event: Mapping[str, Any]) -> str:
    series = event.get("series") or {}
    for found in (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime")):
        if found:
            return str(found)
    return str(event["metadata"].get("creationTimestamp") or "")


def lines(found: Iterable[Reason]) -> Iterator[str]:
    """For a terminal."""
    for each in found:
        many = f" (and {each.pods - 1} more)" if each.pods > 1 else ""
        yield f"    {each.object}{many}: {each.what}"
        yield f"      {each.advice}"
