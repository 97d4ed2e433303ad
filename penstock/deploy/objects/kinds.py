"""Objects of Kubernetes that a bundle has: what runs pods, what leads to them, what protects them.

apps/v1, batch/v1, core v1, policy/v1, networking.k8s.io/v1; of others, LeaderWorkerSet v1 and the Gateway
API's HTTPRoute v1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from .base import Metadata, Object, Part
from .pod import ClaimSpec, LabelSelector, PodTemplate


class RollingUpdate(Part, frozen=True, kw_only=True):
    """How many pods more and fewer there may be while a Deployment is changed."""

    max_surge: int
    max_unavailable: int


class Strategy(Part, frozen=True, kw_only=True):
    """How a Deployment is changed."""

    type: Literal["RollingUpdate", "Recreate"]
    rolling_update: RollingUpdate | None = None


class DeploymentSpec(Part, frozen=True, kw_only=True):
    """`replicas` is left out where something else decides it."""

    replicas: int | None = None
    selector: LabelSelector
    strategy: Strategy
    progress_deadline_seconds: int
    revision_history_limit: int
    template: PodTemplate


class LeaderWorkerTemplate(Part, frozen=True, kw_only=True):
    """A group of pods: a leader, which answers requests, and workers."""

    size: int
    restart_policy: Literal["RecreateGroupOnPodRestart"]
    leader_template: PodTemplate
    worker_template: PodTemplate


class GroupRollingUpdate(Part, frozen=True, kw_only=True):
    """How many groups more and fewer there may be."""

    max_surge: int
    max_unavailable: int


class GroupStrategy(Part, frozen=True, kw_only=True):
    """How a LeaderWorkerSet is changed."""

    type: Literal["RollingUpdate"]
    rolling_update_configuration: GroupRollingUpdate


class LeaderWorkerSetSpec(Part, frozen=True, kw_only=True):
    """`replicas` are groups."""

    replicas: int | None = None
    leader_worker_template: LeaderWorkerTemplate
    rollout_strategy: GroupStrategy
    startup_policy: Literal["LeaderCreated"]


class JobSpec(Part, frozen=True, kw_only=True):
    """Work that ends."""

    backoff_limit: int
    active_deadline_seconds: int
    ttl_seconds_after_finished: int | None = None
    template: PodTemplate


class JobTemplate(Part, frozen=True, kw_only=True):
    """Of Jobs that are made."""

    metadata: Mapping[str, Any]
    spec: JobSpec


class CronJobSpec(Part, frozen=True, kw_only=True):
    """Jobs at certain times."""

    schedule: str
    time_zone: str
    concurrency_policy: Literal["Forbid"]
    starting_deadline_seconds: int
    successful_jobs_history_limit: int
    failed_jobs_history_limit: int
    job_template: JobTemplate


class ServicePort(Part, frozen=True, kw_only=True):
    """Of a Service; what stands behind it is named."""

    name: str
    port: int
    target_port: str
    protocol: Literal["TCP", "UDP"] = msgspec.field(default_factory=lambda: "TCP")
    """Always written, as a container's."""


class ServiceSpec(Part, frozen=True, kw_only=True):
    """One address for several pods."""

    type: Literal["ClusterIP"]
    cluster_ip: Literal["None"] | None = msgspec.field(default=None, name="clusterIP")
    """`None`, in letters: no address of its own, and its name has those of its pods."""
    selector: Mapping[str, str]
    ports: tuple[ServicePort, ...]


class BudgetSpec(Part, frozen=True, kw_only=True):
    """How many pods may be away at a time because somebody wants it so."""

    max_unavailable: int
    unhealthy_pod_eviction_policy: Literal["AlwaysAllow"]
    selector: LabelSelector


class PolicyPeer(Part, frozen=True, kw_only=True):
    """Who may talk: pods of this namespace, or of others."""

    namespace_selector: LabelSelector | None = None
    pod_selector: LabelSelector | None = None


class PolicyPort(Part, frozen=True, kw_only=True):
    """Where."""

    port: str | int
    protocol: Literal["TCP", "UDP"] | None = None


class IngressRule(Part, frozen=True, kw_only=True):
    """From whom; from anybody if not said."""

    from_: tuple[PolicyPeer, ...] = msgspec.field(default=(), name="from")
    ports: tuple[PolicyPort, ...] = ()


class EgressRule(Part, frozen=True, kw_only=True):
    """To whom; to anybody if not said."""

    to: tuple[PolicyPeer, ...] = ()
    ports: tuple[PolicyPort, ...] = ()


def deployment(metadata: Metadata, spec: DeploymentSpec) -> Object:
    return Object(api_version="apps/v1", kind="Deployment", metadata=metadata, body={"spec": spec})


def leader_worker_set(metadata: Metadata, spec: LeaderWorkerSetSpec) -> Object:
    return Object(
        api_version="leaderworkerset.x-k8s.io/v1",
        kind="LeaderWorkerSet",
        metadata=metadata,
        body={"spec": spec},
    )


def job(metadata: Metadata, spec: JobSpec) -> Object:
    return Object(api_version="batch/v1", kind="Job", metadata=metadata, body={"spec": spec})


def cron_job(metadata: Metadata, spec: CronJobSpec) -> Object:
    return Object(api_version="batch/v1", kind="CronJob", metadata=metadata, body={"spec": spec})


def service(metadata: Metadata, spec: ServiceSpec) -> Object:
    return Object(api_version="v1", kind="Service", metadata=metadata, body={"spec": spec})


def config_map(metadata: Metadata, data: Mapping[str, str]) -> Object:
    return Object(api_version="v1", kind="ConfigMap", metadata=metadata, body={"data": data})


def namespace(metadata: Metadata) -> Object:
    return Object(api_version="v1", kind="Namespace", metadata=metadata)


def service_account(metadata: Metadata, pull_secret: str | None) -> Object:
    """An account whose token no pod gets."""
    body: dict[str, Any] = {"automountServiceAccountToken": False}
    if pull_secret is not None:
        body["imagePullSecrets"] = [{"name": pull_secret}]
    return Object(api_version="v1", kind="ServiceAccount", metadata=metadata, body=body)


def claim(metadata: Metadata, spec: ClaimSpec) -> Object:
    return Object(api_version="v1", kind="PersistentVolumeClaim", metadata=metadata, body={"spec": spec})


def disruption_budget(metadata: Metadata, spec: BudgetSpec) -> Object:
    return Object(api_version="policy/v1", kind="PodDisruptionBudget", metadata=metadata, body={"spec": spec})


def network_policy(
    metadata: Metadata,
    pods: LabelSelector,
    ingress: tuple[IngressRule, ...],
    egress: tuple[EgressRule, ...] | None,
) -> Object:
    """Who may talk to these pods, and to whom they may talk; None for `egress` is anybody."""
    spec: dict[str, Any] = {
        "podSelector": pods,
        "policyTypes": ["Ingress"] if egress is None else ["Ingress", "Egress"],
        "ingress": ingress,
    }
    if egress is not None:
        spec["egress"] = egress
    return Object(
        api_version="networking.k8s.io/v1", kind="NetworkPolicy", metadata=metadata, body={"spec": spec}
    )
