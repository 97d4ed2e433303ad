"""Kubernetes objects as rules see them: by kind and name, and pods whatever makes them.

    documents ─▶ Objects ─┬─ things    one for each object
                          └─ pods      one for each pod template: its labels, containers, volumes, replicas

An object without a namespace may be in any: which one, whoever applies it says. Nothing is filled in that
Kubernetes would fill in, but for what functions here say.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .finding import Finding, Rule
from .sources import Document, dig

Keys = tuple[str | int, ...]

_TEMPLATES: Mapping[str, tuple[Keys, ...]] = {
    "Deployment": (("spec", "template"),),
    "StatefulSet": (("spec", "template"),),
    "DaemonSet": (("spec", "template"),),
    "ReplicaSet": (("spec", "template"),),
    "ReplicationController": (("spec", "template"),),
    "Rollout": (("spec", "template"),),
    "Job": (("spec", "template"),),
    "CronJob": (("spec", "jobTemplate", "spec", "template"),),
    "Pod": ((),),
    "LeaderWorkerSet": (
        ("spec", "leaderWorkerTemplate", "leaderTemplate"),
        ("spec", "leaderWorkerTemplate", "workerTemplate"),
    ),
}
"""Kind → where its pod templates stand."""
CLUSTER_WIDE = frozenset(
    "Namespace Node PersistentVolume StorageClass ClusterRole ClusterRoleBinding CustomResourceDefinition "
    "IngressClass GatewayClass PriorityClass ClusterIssuer RuntimeClass APIService CSIDriver "
    "ValidatingWebhookConfiguration MutatingWebhookConfiguration ClusterPolicy NVIDIADriver".split()
)
"""Kinds whose objects are in no namespace."""
BUILT_IN = frozenset(
    "admissionregistration.k8s.io apiextensions.k8s.io apiregistration.k8s.io apps authentication.k8s.io "
    "authorization.k8s.io autoscaling batch certificates.k8s.io coordination.k8s.io discovery.k8s.io "
    "events.k8s.io extensions flowcontrol.apiserver.k8s.io internal.apiserver.k8s.io networking.k8s.io "
    "node.k8s.io policy rbac.authorization.k8s.io resource.k8s.io scheduling.k8s.io storage.k8s.io "
    "storagemigration.k8s.io".split()
)
"""Groups that Kubernetes itself serves, or has served. sparkoperator.k8s.io and its like are custom."""
_MAKE_NO_PODS = frozenset(
    "keda.sh monitoring.coreos.com gateway.networking.k8s.io cert-manager.io networking.gke.io "
    "leaderworkerset.x-k8s.io inference.networking.k8s.io inference.networking.x-k8s.io "
    "kustomize.config.k8s.io eventing.keda.sh".split()
)
"""Custom groups whose controllers make neither Services nor pods with labels of their own."""
_SHOWN = 10
SUFFIXES: Mapping[str, float] = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
}  # fmt: skip
"""Of quantities."""
_QUANTITY = re.compile(
    r"([+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30}))(?:([eE][+-]?\d{1,2})|(Ki|Mi|Gi|Ti|Pi|Ei|[numkMGTPE]?))"
)


def quantity(value: Any) -> float | None:
    """A quantity as Kubernetes has it (`500m`, `16Gi`, `1e3`, 4) as a number; None if it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    return float(match[1] + (match[2] or "")) * SUFFIXES[match[3] or ""]


def integer(value: Any) -> int | None:
    """A whole number, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def port_number(value: Any) -> int | None:
    """A port's number, as such or as text; None for a name, or what is neither."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,5}", value) else integer(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or an empty one for whatever else stands there."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> Sequence[Any]:
    """A list, or an empty one."""
    return value if isinstance(value, list) else ()


def listed(names: object) -> str:
    """Names, for a sentence; of many, the first ten and how many more."""
    found = list(map(str, names)) if isinstance(names, Mapping | list | set | tuple) else []
    rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + rest or "none"


def share(value: Any, total: int, *, up: bool) -> int | None:
    """A number or a percentage of a total, as rollouts and disruption budgets round it."""
    if (number := integer(value)) is not None:
        return number
    match = re.fullmatch(r"(\d{1,4})%", value) if isinstance(value, str) else None
    if match is None:
        return None
    exact = int(match[1]) * total / 100
    return math.ceil(exact) if up else math.floor(exact)


def selects(selector: Any, labels: Mapping[str, Any]) -> bool:
    """Whether a LabelSelector (matchLabels, matchExpressions) matches. An empty one matches all.

    A label whose value is None (one that a controller writes) matches every value.
    """
    if not isinstance(selector, dict):
        return False
    for key, value in mapping(selector.get("matchLabels")).items():
        if not _has(labels, key, (value,)):
            return False
    for each in items(selector.get("matchExpressions")):
        key, operator = str(dig(each, "key", default="")), dig(each, "operator")
        values = tuple(items(dig(each, "values")))
        if operator == "In" and not _has(labels, key, values):
            return False
        if operator == "NotIn" and labels.get(key) is not None and _has(labels, key, values):
            return False
        if operator == "Exists" and key not in labels:
            return False
        if operator == "DoesNotExist" and key in labels:
            return False
    return True


def _has(labels: Mapping[str, Any], key: str, values: Sequence[Any]) -> bool:
    if key not in labels:
        return False
    return labels[key] is None or labels[key] in values


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """An object."""

    document: Document
    group: str
    """Of its API: "" for the core."""
    version: str
    kind: str
    name: str
    namespace: str
    """Empty if the object does not say."""

    def get(self, *keys: str | int, default: Any = None) -> Any:
        return dig(self.document.data, *keys, default=default)

    def finding(self, rule: Rule, what: str, *keys: str | int, fix: str = "") -> Finding:
        return self.document.finding(rule, what, *keys, fix=fix)

    @property
    def labels(self) -> Mapping[str, Any]:
        return mapping(self.get("metadata", "labels"))

    @property
    def annotations(self) -> Mapping[str, Any]:
        return mapping(self.get("metadata", "annotations"))

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"

    def near(self, other: Thing | str) -> bool:
        """Whether both may be in one namespace."""
        namespace = other if isinstance(other, str) else other.namespace
        return not self.namespace or not namespace or self.namespace == namespace


@dataclass(frozen=True, slots=True, eq=False)
class Container:
    """A container of a pod template."""

    pod: Pod
    data: Mapping[str, Any]
    keys: Keys
    """Its path in the document."""
    init: bool
    """It ends before others begin; a sidecar (restartPolicy: Always) is none."""

    @property
    def name(self) -> str:
        return str(self.data.get("name", ""))

    @property
    def image(self) -> str:
        return str(self.data.get("image") or "")

    @property
    def ports(self) -> Sequence[Mapping[str, Any]]:
        return [each for each in items(self.data.get("ports")) if isinstance(each, dict)]

    def get(self, *keys: str | int, default: Any = None) -> Any:
        return dig(self.data, *keys, default=default)

    def finding(self, rule: Rule, what: str, *keys: str | int, fix: str = "") -> Finding:
        return self.pod.owner.finding(rule, what, *self.keys, *keys, fix=fix)

    def devices(self) -> Mapping[str, Any]:
        """Devices that its limits (or requests) name, as `nvidia.com/gpu`."""
        limits = {**mapping(self.get("resources", "requests")), **mapping(self.get("resources", "limits"))}
        return {
            name: value
            for name, value in limits.items()
            if re.fullmatch(r"(nvidia\.com/(gpu|mig-.+|gpu\.shared)|amd\.com/gpu|gpu\.intel\.com/.+)", name)
        }


@dataclass(frozen=True, slots=True, eq=False)
class Pod:
    """A pod template, and who makes pods of it."""

    owner: Thing
    keys: Keys
    """The template's path in the document."""
    role: str = ""
    """`leader` or `worker` of a LeaderWorkerSet."""

    @property
    def labels(self) -> dict[str, Any]:
        """Of the pods, with those that controllers write."""
        labels = dict(mapping(self.get("metadata", "labels")))
        owner = self.owner
        if owner.kind in ("Job", "CronJob"):
            written = owner.name if owner.kind == "Job" else None
            labels |= {"job-name": written, "batch.kubernetes.io/job-name": written}
        if owner.kind == "LeaderWorkerSet":
            prefix = "leaderworkerset.sigs.k8s.io"
            labels |= {f"{prefix}/name": owner.name, f"{prefix}/group-index": None}
            labels[f"{prefix}/worker-index"] = "0" if self.role == "leader" else None
        if owner.kind == "StatefulSet":
            labels |= {"statefulset.kubernetes.io/pod-name": None, "apps.kubernetes.io/pod-index": None}
        return labels

    @property
    def spec(self) -> Mapping[str, Any]:
        return mapping(self.get("spec"))

    def get(self, *keys: str | int, default: Any = None) -> Any:
        return self.owner.get(*self.keys, *keys, default=default)

    def finding(self, rule: Rule, what: str, *keys: str | int, fix: str = "") -> Finding:
        return self.owner.finding(rule, what, *self.keys, *keys, fix=fix)

    @property
    def replicas(self) -> int:
        """Of the object, before anything scales it: pods of a Deployment, groups of a LeaderWorkerSet."""
        if self.owner.kind in ("Pod", "Job", "CronJob", "DaemonSet"):
            return 1
        found = integer(self.owner.get("spec", "replicas"))
        return 1 if found is None else found

    @property
    def containers(self) -> list[Container]:
        """Those that run for as long as the pod, sidecars with them."""
        return [each for each in self.all_containers if not each.init]

    @property
    def all_containers(self) -> list[Container]:
        result = []
        for field_name in ("initContainers", "containers"):
            for index, data in enumerate(items(self.spec.get(field_name))):
                if isinstance(data, dict):
                    init = field_name == "initContainers" and data.get("restartPolicy") != "Always"
                    result.append(Container(self, data, (*self.keys, "spec", field_name, index), init))
        return result

    @property
    def volumes(self) -> Mapping[str, tuple[int, Mapping[str, Any]]]:
        """Name → (index, volume); claims of a StatefulSet or LeaderWorkerSet with them."""
        result: dict[str, tuple[int, Mapping[str, Any]]] = {}
        for index, volume in enumerate(items(self.spec.get("volumes"))):
            if isinstance(volume, dict):
                result[str(volume.get("name"))] = index, volume
        claims = self.owner.get("spec", "volumeClaimTemplates") or self.owner.get(
            "spec", "leaderWorkerTemplate", "volumeClaimTemplates"
        )
        for claim in items(claims):
            name = str(dig(claim, "metadata", "name"))
            result[name] = -1, {"name": name, "persistentVolumeClaim": {"claimName": None}}
        return result

    @property
    def port_names(self) -> set[str]:
        return {str(port["name"]) for each in self.containers for port in each.ports if "name" in port}

    @property
    def port_numbers(self) -> set[int]:
        found = (integer(port.get("containerPort")) for each in self.containers for port in each.ports)
        return {number for number in found if number is not None}


@dataclass(eq=False)
class Objects:
    """The objects of all texts."""

    things: tuple[Thing, ...]
    pods: tuple[Pod, ...]
    documents: tuple[Document, ...]
    _by_kind: dict[str, list[Thing]] = field(default_factory=dict)

    def of(self, *kinds: str) -> Iterator[Thing]:
        """Objects of these kinds, in order."""
        for kind in kinds:
            yield from self._by_kind.get(kind, ())

    def find(self, kind: str, name: str, namespace: str) -> Thing | None:
        """An object by its name."""
        for each in self._by_kind.get(kind, ()):
            if each.name == name and (each.kind in CLUSTER_WIDE or each.near(namespace)):
                return each
        return None

    def operated(self, name: str) -> bool:
        """Whether a name may be of something that an operator makes: a custom resource's name begins it, as
        the RayService `llama` has the Service `llama-serve-svc`."""
        return any(name == each or name.startswith(f"{each}-") for each in self._custom)

    @cached_property
    def _custom(self) -> frozenset[str]:
        return frozenset(
            each.name
            for each in self.things
            if each.group and each.group not in BUILT_IN and each.group not in _MAKE_NO_PODS and each.name
        )

    def pods_near(self, thing: Thing) -> list[Pod]:
        """Pods that may be in a thing's namespace."""
        return [pod for pod in self.pods if pod.owner.near(thing)]

    def selected(self, thing: Thing, selector: Any) -> list[Pod]:
        """Pods in a thing's namespace that a LabelSelector matches."""
        return [pod for pod in self.pods_near(thing) if selects(selector, pod.labels)]

    def behind(self, service: Thing) -> list[Pod]:
        """Pods that a Service selects."""
        selector = service.get("spec", "selector")
        return self.selected(service, {"matchLabels": selector}) if selector else []

    def services_of(self, pod: Pod) -> list[Thing]:
        """Services that select a pod."""
        return [each for each in self.of("Service") if pod in self.behind(each)]


_FILES = re.compile(
    r"(.+\.)?config\.k8s\.io|audit\.k8s\.io|kubeadm\.k8s\.io|kind\.x-k8s\.io|client\.authentication\.k8s\.io|"
    r"skaffold|minikube.*|k3d\.io|eksctl\.io"
)
"""Groups of files for programs, which no API server is given."""


_PATCH = re.compile(r"(^|[/_.-])patch(es)?([/_.-]|$)", re.IGNORECASE)
"""Names of files and folders that are patches, whoever refers to them."""


def patches_of(documents: Sequence[Document]) -> set[str]:
    """Paths of files that a kustomization among the documents takes for patches: parts of objects."""
    found: set[str] = set()
    for document in documents:
        if dig(document.data, "kind") not in ("Kustomization", "Component"):
            continue
        folder = posixpath.dirname(document.path)
        named = [dig(each, "path") for each in items(dig(document.data, "patches"))]
        named += [dig(each, "path") for each in items(dig(document.data, "patchesJson6902"))]
        named += items(dig(document.data, "patchesStrategicMerge"))
        found |= {posixpath.normpath(posixpath.join(folder, each)) for each in named if isinstance(each, str)}
    return found


def objects_of(documents: Sequence[Document]) -> Objects:
    """The Kubernetes objects among documents."""
    patches = patches_of(documents)
    whole = (
        each
        for each in documents
        if posixpath.normpath(each.path) not in patches and not _PATCH.search(each.path)
    )
    things = tuple(thing for each in whole if (thing := thing_of(each)) is not None)
    pods: list[Pod] = []
    by_kind: dict[str, list[Thing]] = {}
    for thing in things:
        by_kind.setdefault(thing.kind, []).append(thing)
        if thing.kind not in _TEMPLATES or thing.group not in _GROUPS[thing.kind]:
            continue
        roles = ("leader", "worker") if thing.kind == "LeaderWorkerSet" else ("",)
        for keys, role in zip(_TEMPLATES[thing.kind], roles, strict=True):
            if isinstance(thing.get(*keys), dict):
                pods.append(Pod(thing, keys, role))
    return Objects(things, tuple(pods), tuple(documents), by_kind)


_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Deployment": ("apps", "extensions"),
    "StatefulSet": ("apps",),
    "DaemonSet": ("apps", "extensions"),
    "ReplicaSet": ("apps", "extensions"),
    "ReplicationController": ("",),
    "Rollout": ("argoproj.io",),
    "Job": ("batch",),
    "CronJob": ("batch",),
    "Pod": ("",),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io",),
}


def thing_of(document: Document) -> Thing | None:
    """The object in a document; None if it is something else."""
    data = document.data
    if not isinstance(data, dict):
        return None
    version, kind = data.get("apiVersion"), data.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str) or not kind:
        return None
    group, _, short = version.rpartition("/")
    if _FILES.fullmatch(group) or (version == "v1" and kind == "Config"):
        return None
    name, namespace = dig(data, "metadata", "name"), dig(data, "metadata", "namespace")
    return Thing(
        document, group, short, kind,
        name if isinstance(name, str) else "", namespace if isinstance(namespace, str) else "",
    )  # fmt: skip
