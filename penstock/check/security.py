"""What pods may do, and what they tell (T22, S35, S62): privileges, hosts, keys, images, spot nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .cluster import Container, Objects, Pod, items, mapping
from .engines import KEY
from .finding import Finding, Rule, Severity
from .lifecycle import pre_stop
from .serving import Engine, engines_of
from .words import is_unknown

PRIVILEGED = Rule(
    "privileged",
    Severity.ERROR,
    "a container that is its host's root",
    "Whoever gets into it has the node, and all pods and GPUs on it.",
    "Drop privileged and added capabilities; devices come from the device plugin.",
)
ROOT = Rule(
    "runs-as-root",
    Severity.NOTE,
    "a container that may run as root",
    "A hole in the engine, or in a model's code, is root in the container; clusters with the standard "
    "`restricted` refuse it.",
    "securityContext: runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false, "
    "capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}.",
)
RESTRICTED = Rule(
    "pod-security",
    Severity.ERROR,
    "a pod that its namespace's Pod Security Standard refuses",
    "The API server refuses its pods: the Deployment stays without any.",
    "Give the security context that the standard asks for.",
)
HOST = Rule(
    "host-access",
    Severity.WARNING,
    "a pod that shares its node's network, processes or files",
    "It sees and changes what belongs to others on the node, and it passes NetworkPolicies by.",
    "Use a PersistentVolumeClaim, a Service, an emptyDir.",
)
TOLERATION = Rule(
    "spot-toleration",
    Severity.ERROR,
    "a pod that selects spot nodes and does not tolerate their taint",
    "It waits in Pending for ever.",
    "tolerations: [{key: kubernetes.azure.com/scalesetpriority, operator: Equal, value: spot, "
    "effect: NoSchedule}]",
)
SPOT_ONLY = Rule(
    "spot-only",
    Severity.WARNING,
    "a model whose replicas are all on spot nodes",
    "They may all be taken at once, and nobody serves (S62).",
    "Keep at least one replica on demand, and let the burst be on spot nodes.",
)
SPOT_DRAIN = Rule(
    "spot-grace",
    Severity.WARNING,
    "a drain that is longer than a spot node's notice",
    "The node is gone before the drain ends, and requests with it.",
    "preStop and drain together below the notice: 30 s on AKS, 120 s on EKS, and 15 s on GKE, whose kubelet "
    "keeps the rest of its 30 s for pods of the system.",
)
RULES = (PRIVILEGED, ROOT, RESTRICTED, HOST, TOLERATION, SPOT_ONLY, SPOT_DRAIN)

_NAMED = re.compile(
    r"(^|_)(TOKEN|API_KEY|APIKEY|SECRET|SECRET_KEY|PASSWORD|PASSWD|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS)$"
)
_KNOWN = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|gsk_[A-Za-z0-9]{16,}|nvapi-[A-Za-z0-9_-]{16,}|"
    r"AKIA[A-Z0-9]{12,}|ghp_[A-Za-z0-9]{16,}|xox[bp]-[A-Za-z0-9-]{16,})"
)
_NOT_SECRET = re.compile(
    r"^$|\$\(|\$\{|^<.*>$|^/|^(true|false|none|null|not[-_]?needed|empty|dummy|unused|EMPTY|\d{1,5})$",
    re.IGNORECASE,
)
_SPOT: Mapping[str, tuple[str, int]] = {
    "kubernetes.azure.com/scalesetpriority": ("spot", 30),
    "cloud.google.com/gke-spot": ("true", 15),
    "cloud.google.com/gke-preemptible": ("true", 15),
    "eks.amazonaws.com/capacityType": ("SPOT", 120),
    "karpenter.sh/capacity-type": ("spot", 120),
}
"""Label of spot nodes → its value, and seconds that pods have; from the documentation of AKS, GKE, EKS and
Karpenter."""
_TAINTED = "kubernetes.azure.com/scalesetpriority"
"""AKS alone taints its spot nodes by itself."""
_EMBEDS = re.compile(r"(^|[/_-])(bge|e5|gte|embed\w*|rerank\w*|minilm)([/_-]|$)", re.IGNORECASE)
"""Models of work that may wait (S35)."""
_ADDED = frozenset(("ALL", "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "NET_ADMIN", "DAC_READ_SEARCH", "BPF"))
_INFRASTRUCTURE = frozenset(("DaemonSet",))
"""Agents of nodes: device plugins and exporters need the host."""


def examine(objects: Objects) -> Iterator[Finding]:
    """What is wrong with privileges, keys and spot nodes."""
    for pod in objects.pods:
        agent = pod.owner.kind in _INFRASTRUCTURE
        if not agent:
            yield from _host(pod)
        broken = list(_restricted(pod))
        enforced = _standard(objects, pod)
        if enforced == "restricted" or (enforced == "baseline" and any(each[2] for each in broken)):
            for what, keys, _ in broken if enforced == "restricted" else [each for each in broken if each[2]]:
                yield pod.finding(RESTRICTED, f"{what} (namespace {pod.owner.namespace}: {enforced}).", *keys)
        for container in pod.all_containers:
            if not agent:
                yield from _privileges(container)
            yield from _keys(container)
        yield from _tolerated(pod)
    noted: set[int] = set()
    for engine in engines_of(objects):
        pod = engine.container.pod
        if id(pod) not in noted and _may_be_root(engine.container) and _standard(objects, pod) is None:
            noted.add(id(pod))
            yield engine.container.finding(
                ROOT, f"{engine.container.name} has no runAsNonRoot.", "securityContext"
            )
        yield from _reclaimed(engine)
        if not _EMBEDS.search(engine.model or ""):
            yield from _only_spot(objects, pod)
    yield from _config_keys(objects)


def _standard(objects: Objects, pod: Pod) -> str | None:
    namespace = objects.find("Namespace", pod.owner.namespace, "")
    found = namespace.labels.get("pod-security.kubernetes.io/enforce") if namespace is not None else None
    return str(found) if found in ("baseline", "restricted") else None


def _context(container: Container, name: str) -> Any:
    own = mapping(container.get("securityContext"))
    return own[name] if name in own else mapping(container.pod.spec.get("securityContext")).get(name)


def _may_be_root(container: Container) -> bool:
    user = _context(container, "runAsUser")
    if isinstance(user, int):
        return user == 0
    return _context(container, "runAsNonRoot") is not True


def _restricted(pod: Pod) -> Iterator[tuple[str, tuple[str | int, ...], bool]]:
    """(what, path, whether `baseline` refuses it, too) of what the standard `restricted` refuses."""
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(name) is True:
            yield f"{name}: true", ("spec", name), True
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for name, (index, volume) in pod.volumes.items():
        kinds = set(volume) - {"name"}
        if index >= 0 and kinds - allowed:
            yield (
                f"volume {name} is a {', '.join(sorted(kinds - allowed))}",
                ("spec", "volumes", index),
                "hostPath" in kinds,
            )
    for container in pod.all_containers:
        keys = container.keys[len(pod.keys) :]
        context = mapping(container.get("securityContext"))
        at = (*keys, "securityContext")
        if context.get("privileged") is True:
            yield f"{container.name} is privileged", (*at, "privileged"), True
        if context.get("allowPrivilegeEscalation") is not False:
            yield (
                f"{container.name}: allowPrivilegeEscalation is not false",
                (*at, "allowPrivilegeEscalation"),
                False,
            )
        capabilities = mapping(context.get("capabilities"))
        if "ALL" not in items(capabilities.get("drop")):
            yield f"{container.name} does not drop ALL capabilities", (*at, "capabilities"), False
        added = [str(each) for each in items(capabilities.get("add")) if each != "NET_BIND_SERVICE"]
        if added:
            yield (
                f"{container.name} adds {', '.join(added)}",
                (*at, "capabilities", "add"),
                bool(_ADDED & set(added)),
            )
        if _context(container, "runAsNonRoot") is not True:
            yield f"{container.name} may run as root", (*at, "runAsNonRoot"), False
        if _context(container, "runAsUser") == 0:
            yield f"{container.name} runs as user 0", (*at, "runAsUser"), False
        profile = mapping(_context(container, "seccompProfile")).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{container.name} has no seccompProfile", (*at, "seccompProfile"), profile == "Unconfined"


def _privileges(container: Container) -> Iterator[Finding]:
    context = mapping(container.get("securityContext"))
    if context.get("privileged") is True:
        yield container.finding(
            PRIVILEGED, f"{container.name} is privileged.", "securityContext", "privileged"
        )
    added = [str(each) for each in items(mapping(context.get("capabilities")).get("add")) if each in _ADDED]
    if added:
        what = f"{container.name} adds {', '.join(added)}."
        yield container.finding(PRIVILEGED, what, "securityContext", "capabilities", "add")


def _host(pod: Pod) -> Iterator[Finding]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(name) is True:
            yield pod.finding(HOST, f"{name}: true.", "spec", name)
    for name, (index, volume) in pod.volumes.items():
        path = mapping(volume.get("hostPath")).get("path")
        if isinstance(path, str):
            yield pod.finding(HOST, f"{name} is {path} of the node.", "spec", "volumes", index, "hostPath")


def _keys(container: Container) -> Iterator[Finding]:
    for index, each in enumerate(items(container.data.get("env"))):
        name, value = str(mapping(each).get("name")), mapping(each).get("value")
        if not isinstance(value, str) or value == name or is_unknown(value) or _NOT_SECRET.search(value):
            continue
        if _KNOWN.search(value) or (_NAMED.search(name.upper()) and len(value) >= 8):
            yield container.finding(KEY, f"{name} has its value here: {value[:4]}….", "env", index, "value")
    for field in ("command", "args"):
        for index, word in enumerate(items(container.data.get(field))):
            found = _KNOWN.search(word) if isinstance(word, str) else None
            if found:
                yield container.finding(
                    KEY, f"A key stands in the command line: {found[0][:4]}….", field, index
                )


def _config_keys(objects: Objects) -> Iterator[Finding]:
    for config in objects.of("ConfigMap"):
        for key, text in mapping(config.get("data")).items():
            if isinstance(text, str) and (found := _KNOWN.search(text)):
                line, column = config.document.value_at("data", key, offset=found.start())
                what = f"A key stands in {config.title}: {found[0][:4]}…."
                yield Finding(KEY, config.document.path, line, column, what)


def _spot_label(pod: Pod) -> tuple[str, int] | None:
    """(label, seconds of notice) by which a pod selects spot nodes alone."""
    selector = mapping(pod.spec.get("nodeSelector"))
    for key, (value, notice) in _SPOT.items():
        if selector.get(key) == value:
            return key, notice
    affinity = mapping(mapping(pod.spec.get("affinity")).get("nodeAffinity"))
    terms = items(
        mapping(affinity.get("requiredDuringSchedulingIgnoredDuringExecution")).get("nodeSelectorTerms")
    )
    found = []
    for term in terms:
        labels = [
            (key, _SPOT[key][1])
            for each in items(mapping(term).get("matchExpressions"))
            if (key := str(mapping(each).get("key"))) in _SPOT
            and mapping(each).get("operator") == "In"
            and list(items(mapping(each).get("values"))) == [_SPOT[key][0]]
        ]
        if not labels:
            return None
        found.append(labels[0])
    return found[0] if found else None


def _tolerated(pod: Pod) -> Iterator[Finding]:
    key, _ = _spot_label(pod) or ("", 0)
    if key == _TAINTED and not any(
        _tolerates(each, key, "spot") for each in items(pod.spec.get("tolerations"))
    ):
        yield pod.finding(TOLERATION, f"{pod.owner.title} selects {key}: spot.", "spec")


def _reclaimed(engine: Engine) -> Iterator[Finding]:
    pod = engine.container.pod
    key, notice = _spot_label(pod) or ("", 0)
    drain = engine.seconds("--shutdown-timeout")
    if not key or drain is None or pod.owner.kind in ("Job", "CronJob"):
        return
    before = pre_stop(engine.container)
    if before + drain > notice:
        what = f"preStop {before:g} s + drain {drain:g} s; the notice is {notice} s."
        yield pod.finding(SPOT_DRAIN, what, "spec", "terminationGracePeriodSeconds")


def _tolerates(toleration: Any, key: str, value: str) -> bool:
    entry = mapping(toleration)
    if entry.get("effect") not in (None, "NoSchedule"):
        return False
    if entry.get("operator") == "Exists":
        return entry.get("key") in (None, key)
    return entry.get("key") == key and entry.get("value") == value


def _only_spot(objects: Objects, pod: Pod) -> Iterator[Finding]:
    if _spot_label(pod) is None or pod.owner.kind not in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
        return
    behind = [each for service in objects.services_of(pod) for each in objects.behind(service)]
    if behind and all(_spot_label(each) is not None for each in behind):
        yield pod.finding(
            SPOT_ONLY, f"All pods behind the Service of {pod.owner.title} are on spot nodes.", "spec"
        )
