"""Pods: containers, probes, volumes, where they may run, and what they may do. Core v1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from .base import Part


class KeyRef(Part, frozen=True, kw_only=True):
    """An entry of a Secret or ConfigMap."""

    name: str
    key: str
    optional: bool | None = None


class EnvSource(Part, frozen=True, kw_only=True):
    """Where a variable's value comes from."""

    secret_key_ref: KeyRef | None = None
    config_map_key_ref: KeyRef | None = None
    field_ref: Mapping[str, str] | None = None


class Env(Part, frozen=True, kw_only=True):
    """An environment variable."""

    name: str
    value: str | None = None
    value_from: EnvSource | None = None


class NameRef(Part, frozen=True, kw_only=True):
    """Something of the same namespace."""

    name: str


class EnvFrom(Part, frozen=True, kw_only=True):
    """All entries of a ConfigMap."""

    config_map_ref: NameRef


class Port(Part, frozen=True, kw_only=True):
    """A port of a container. Its name is what Services and monitors call it by."""

    name: str
    container_port: int
    protocol: Literal["TCP", "UDP"] = msgspec.field(default_factory=lambda: "TCP")
    """Always written: ports are known by it when an object is applied a second time (server-side apply)."""


class HttpGet(Part, frozen=True, kw_only=True):
    """A request whose status is judged."""

    path: str
    port: str


class Probe(Part, frozen=True, kw_only=True):
    """What the kubelet asks; times are seconds."""

    http_get: HttpGet
    period_seconds: int
    timeout_seconds: int
    failure_threshold: int
    initial_delay_seconds: int | None = None


class Sleep(Part, frozen=True, kw_only=True):
    """Nothing, for so long."""

    seconds: int


class Handler(Part, frozen=True, kw_only=True):
    """What is done before a container is told to end."""

    sleep: Sleep


class Lifecycle(Part, frozen=True, kw_only=True):
    """Of a container."""

    pre_stop: Handler


class Resources(Part, frozen=True, kw_only=True):
    """What a container takes: at least, and at most."""

    requests: Mapping[str, str] = {}
    limits: Mapping[str, str] = {}


class Capabilities(Part, frozen=True, kw_only=True):
    """Of Linux."""

    drop: tuple[str, ...]


class SecurityContext(Part, frozen=True, kw_only=True):
    """Of a container; the defaults are those that the Pod Security Standard `restricted` asks for."""

    allow_privilege_escalation: bool
    capabilities: Capabilities
    read_only_root_filesystem: bool


class SeccompProfile(Part, frozen=True, kw_only=True):
    """Which system calls a pod may make."""

    type: str


class PodSecurityContext(Part, frozen=True, kw_only=True):
    """Of a pod."""

    run_as_non_root: bool
    run_as_user: int | None = None
    run_as_group: int | None = None
    fs_group: int | None = None
    fs_group_change_policy: str | None = None
    seccomp_profile: SeccompProfile


class Mount(Part, frozen=True, kw_only=True):
    """A volume in a container."""

    name: str
    mount_path: str
    read_only: bool | None = None
    sub_path: str | None = None


class Container(Part, frozen=True, kw_only=True):
    """A process and its surroundings."""

    name: str
    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env_from: tuple[EnvFrom, ...] = ()
    env: tuple[Env, ...] = ()
    ports: tuple[Port, ...] = ()
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    lifecycle: Lifecycle | None = None
    resources: Resources
    security_context: SecurityContext
    volume_mounts: tuple[Mount, ...] = ()


class EmptyDir(Part, frozen=True, kw_only=True):
    """A folder that ends with its pod."""

    medium: Literal["Memory"] | None = None
    size_limit: str | None = None


class ConfigMapVolume(Part, frozen=True, kw_only=True):
    """Entries of a ConfigMap as files."""

    name: str


class SecretVolume(Part, frozen=True, kw_only=True):
    """Entries of a Secret as files."""

    secret_name: str


class ClaimVolume(Part, frozen=True, kw_only=True):
    """What a PersistentVolumeClaim has claimed."""

    claim_name: str
    read_only: bool | None = None


class ClaimSpec(Part, frozen=True, kw_only=True):
    """What a PersistentVolumeClaim wants."""

    access_modes: tuple[str, ...]
    storage_class_name: str | None = None
    resources: Resources


class ClaimTemplate(Part, frozen=True, kw_only=True):
    """A claim that is made with each pod, and ends with it."""

    spec: ClaimSpec


class EphemeralVolume(Part, frozen=True, kw_only=True):
    """A volume of a pod's own."""

    volume_claim_template: ClaimTemplate


class Volume(Part, frozen=True, kw_only=True):
    """One of these, under a name."""

    name: str
    empty_dir: EmptyDir | None = None
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    persistent_volume_claim: ClaimVolume | None = None
    ephemeral: EphemeralVolume | None = None


class Toleration(Part, frozen=True, kw_only=True):
    """Of a taint."""

    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: str | None = None


class Requirement(Part, frozen=True, kw_only=True):
    """Of a node's labels, or a pod's."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()


class LabelSelector(Part, frozen=True, kw_only=True):
    """Which pods."""

    match_labels: Mapping[str, str] = {}
    match_expressions: tuple[Requirement, ...] = ()


class NodeSelectorTerm(Part, frozen=True, kw_only=True):
    """All of these."""

    match_expressions: tuple[Requirement, ...]


class NodeSelector(Part, frozen=True, kw_only=True):
    """One of these."""

    node_selector_terms: tuple[NodeSelectorTerm, ...]


class PreferredNodes(Part, frozen=True, kw_only=True):
    """Rather these."""

    weight: int
    preference: NodeSelectorTerm


class NodeAffinity(Part, frozen=True, kw_only=True):
    """On which nodes."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    preferred_during_scheduling_ignored_during_execution: tuple[PreferredNodes, ...] = ()


class PodAffinityTerm(Part, frozen=True, kw_only=True):
    """Beside which pods, or not beside them."""

    label_selector: LabelSelector
    topology_key: str


class WeightedPodAffinity(Part, frozen=True, kw_only=True):
    """The same, rather than by all means."""

    weight: int
    pod_affinity_term: PodAffinityTerm


class PodAntiAffinity(Part, frozen=True, kw_only=True):
    """Not beside these pods."""

    required_during_scheduling_ignored_during_execution: tuple[PodAffinityTerm, ...] = ()
    preferred_during_scheduling_ignored_during_execution: tuple[WeightedPodAffinity, ...] = ()


class Affinity(Part, frozen=True, kw_only=True):
    """Where a pod goes."""

    node_affinity: NodeAffinity | None = None
    pod_anti_affinity: PodAntiAffinity | None = None


class Spread(Part, frozen=True, kw_only=True):
    """How evenly pods are spread, as over zones."""

    max_skew: int
    topology_key: str
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    label_selector: LabelSelector


class PodSpec(Part, frozen=True, kw_only=True):
    """A pod."""

    service_account_name: str
    automount_service_account_token: bool
    enable_service_links: bool
    restart_policy: Literal["Always", "OnFailure", "Never"] | None = None
    termination_grace_period_seconds: int | None = None
    priority_class_name: str | None = None
    image_pull_secrets: tuple[NameRef, ...] = ()
    security_context: PodSecurityContext
    node_selector: Mapping[str, str] = {}
    affinity: Affinity | None = None
    tolerations: tuple[Toleration, ...] = ()
    topology_spread_constraints: tuple[Spread, ...] = ()
    init_containers: tuple[Container, ...] = ()
    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...] = ()


class TemplateMetadata(Part, frozen=True, kw_only=True):
    """Labels and annotations of pods that are made."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str] = {}


class PodTemplate(Part, frozen=True, kw_only=True):
    """Of pods that are made."""

    metadata: TemplateMetadata
    spec: PodSpec


def changed(part: Part, **fields: Any) -> Any:
    """The same part with other fields."""
    return msgspec.structs.replace(part, **fields)
