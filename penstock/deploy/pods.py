"""What all pods of a bundle have: who they are, what they may do, where they may run.

Security is the Pod Security Standard `restricted`, and a root file system that nobody writes: HOME and /tmp
are volumes, in which caches of kernels lie. User 2000 is vLLM's image's own; ours runs as any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from penstock.fleet.hardware import GIB
from penstock.spec.cluster import Taint
from penstock.spec.model import Pool

from . import names, providers
from .objects.base import Metadata
from .objects.pod import (
    Affinity,
    Capabilities,
    Container,
    EmptyDir,
    Env,
    EnvSource,
    HttpGet,
    KeyRef,
    LabelSelector,
    Mount,
    NameRef,
    NodeAffinity,
    NodeSelector,
    NodeSelectorTerm,
    PodAffinityTerm,
    PodAntiAffinity,
    PodSecurityContext,
    PodSpec,
    Probe,
    Requirement,
    Resources,
    SeccompProfile,
    SecurityContext,
    Spread,
    Toleration,
    Volume,
    WeightedPodAffinity,
)
from .workloads import Bundle, Workload

USER = 2000
HOME = "/home/penstock"
_HOME_SIZE = 8 * GIB
"""Compiled kernels and graphs; vLLM's are a few GiB."""

RESTRICTED = SecurityContext(
    allow_privilege_escalation=False,
    capabilities=Capabilities(drop=("ALL",)),
    read_only_root_filesystem=True,
)
POD_SECURITY = PodSecurityContext(
    run_as_non_root=True,
    run_as_user=USER,
    run_as_group=USER,
    fs_group=USER,
    fs_group_change_policy="OnRootMismatch",
    seccomp_profile=SeccompProfile(type="RuntimeDefault"),
)


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them: 24Gi, 512Mi."""
    for unit, suffix in ((GIB, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)


def metadata(
    bundle: Bundle, name: str, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None
) -> Metadata:
    """Of an object of the bundle's namespace."""
    return Metadata(
        name=name,
        namespace=bundle.namespace,
        labels={**labels, names.MANAGED_BY: "penstock"},
        annotations=annotations or {},
    )


def resources(*, cpus: str, memory: int, device: str | None = None, devices: int = 0) -> Resources:
    """Memory and devices are asked for and limited alike: what is promised is there. CPU time has no limit,
    which would only stop who could go on."""
    each = {device: str(devices)} if device is not None else {}
    size = quantity(memory)
    return Resources(
        requests={"cpu": cpus, "memory": size, **each},
        limits={"memory": size, **each},
    )


def secret_env(bundle: Bundle, variable: str, entry: str | None = None) -> Env:
    """A variable from the Secret `cluster.secret`."""
    return Env(
        name=variable,
        value_from=EnvSource(secret_key_ref=KeyRef(name=bundle.spec.cluster.secret, key=entry or variable)),
    )


def home_env() -> tuple[Env, ...]:
    """A home for a user whom the image need not know: torch asks for the name of whoever runs it."""
    return (Env(name="HOME", value=HOME), Env(name="USER", value="penstock"))


def scratch(size: int = _HOME_SIZE) -> tuple[tuple[Volume, ...], tuple[Mount, ...]]:
    """Volumes that a process may write, and where they are."""
    return (
        (
            Volume(name="home", empty_dir=EmptyDir(size_limit=quantity(size))),
            Volume(name="tmp", empty_dir=EmptyDir(size_limit="1Gi")),
        ),
        (Mount(name="home", mount_path=HOME), Mount(name="tmp", mount_path="/tmp")),
    )


def pull_secrets(bundle: Bundle) -> tuple[NameRef, ...]:
    secret = bundle.spec.cluster.images.pull_secret
    return (NameRef(name=secret),) if secret is not None else ()


def tolerations(taints: Iterable[Taint]) -> tuple[Toleration, ...]:
    return tuple(
        Toleration(
            key=taint.key,
            operator="Exists" if taint.value is None else "Equal",
            value=taint.value,
            effect=taint.effect,
        )
        for taint in taints
    )


def nodes(bundle: Bundle, workload: Workload) -> NodeAffinity | None:
    """Nodes with its devices; for spot pools spot nodes, for others all but them: they are taken away."""
    marks = providers.MARKS[bundle.spec.cluster.provider]
    wanted = []
    if workload.device_labels is not None:
        label, values = workload.device_labels
        wanted.append(Requirement(key=label, operator="In", values=values))
    if workload.pool.purchase == "spot":
        # one term for each of the labels, of which a node has one
        terms = [
            (*wanted, Requirement(key=key, operator="In", values=(value,))) for key, value in marks.spot
        ] or [tuple(wanted)]
    else:
        avoided = [Requirement(key=key, operator="NotIn", values=(value,)) for key, value in marks.spot]
        terms = [(*wanted, *avoided)]
    found = tuple(NodeSelectorTerm(match_expressions=term) for term in terms if term)
    if not found:
        return None
    return NodeAffinity(
        required_during_scheduling_ignored_during_execution=NodeSelector(node_selector_terms=found)
    )


def on_demand(bundle: Bundle) -> NodeAffinity | None:
    """Anything but spot nodes, where the provider's labels tell them."""
    marks = providers.MARKS[bundle.spec.cluster.provider]
    avoided = tuple(Requirement(key=key, operator="NotIn", values=(value,)) for key, value in marks.spot)
    if not avoided:
        return None
    return NodeAffinity(
        required_during_scheduling_ignored_during_execution=NodeSelector(
            node_selector_terms=(NodeSelectorTerm(match_expressions=avoided),)
        )
    )


def apart(labels: Mapping[str, str], required: NodeAffinity | None = None) -> Affinity:
    """Rather on nodes of their own. By all means would leave replicas without a place where nodes have
    several devices, or are few."""
    term = PodAffinityTerm(
        label_selector=LabelSelector(match_labels=labels), topology_key="kubernetes.io/hostname"
    )
    return Affinity(
        node_affinity=required,
        pod_anti_affinity=PodAntiAffinity(
            preferred_during_scheduling_ignored_during_execution=(
                WeightedPodAffinity(weight=100, pod_affinity_term=term),
            )
        ),
    )


def spread(labels: Mapping[str, str]) -> tuple[Spread, ...]:
    """Over zones, where there are several."""
    return (
        Spread(
            max_skew=1,
            topology_key="topology.kubernetes.io/zone",
            when_unsatisfiable="ScheduleAnyway",
            label_selector=LabelSelector(match_labels=labels),
        ),
    )


def node_selector(pool: Pool) -> Mapping[str, str]:
    """What the pool itself says of its nodes."""
    return dict(pool.nodes.labels)


def probe(path: str, *, period: int, timeout: int, failures: int) -> Probe:
    """A question by HTTP, at the port that requests come to; seconds, and how often it may fail."""
    return Probe(
        http_get=HttpGet(path=path, port=names.PORT),
        period_seconds=period,
        timeout_seconds=timeout,
        failure_threshold=failures,
    )


def ending(
    bundle: Bundle,
    account: str,
    container: Container,
    volumes: tuple[Volume, ...],
    restart: Literal["OnFailure", "Never"] = "Never",
) -> PodSpec:
    """A pod that does one thing and ends, as the ServiceAccount of that name."""
    return PodSpec(
        service_account_name=account,
        automount_service_account_token=False,
        enable_service_links=False,
        restart_policy=restart,
        image_pull_secrets=pull_secrets(bundle),
        security_context=POD_SECURITY,
        containers=(container,),
        volumes=volumes,
    )
