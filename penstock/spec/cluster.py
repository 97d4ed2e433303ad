"""What only a cluster needs to know: `penstock compile` reads it, `penstock up` passes it by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .parts import Image, Label, LabelKey, LabelValue, Name, Part
from .units import Bytes, Seconds

Host = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+$", max_length=253
    ),
]
"""A name in DNS."""


class Taint(Part):
    """A taint of nodes, which pods must tolerate."""

    key: LabelKey
    """As `nvidia.com/gpu`."""
    value: LabelValue | None = None
    """Any if not given."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"
    """What it does to pods that do not tolerate it."""


class Nodes(Part):
    """The nodes of a pool, where the provider's own labels and taints do not tell them."""

    devices: Annotated[int, Field(ge=1)] | None = None
    """Devices of each node; what such machines usually have if not given."""
    labels: dict[LabelKey, LabelValue] = {}
    """Labels that pods select them by, beside the provider's and the GPU's."""
    taints: tuple[Taint, ...] = ()
    """Taints that pods tolerate, beside the provider's and the GPU's."""


class Scale(Part):
    """How the replicas of a model follow its load. `replicas` is the floor, which stays."""

    max: Annotated[int, Field(ge=1)]
    """Most replicas, floor and burst together."""
    burst: Name | None = None
    """Pool of the replicas beyond the floor, as a spot one; the model's own if not given."""
    waiting: Annotated[int, Field(ge=1)] = 10
    """Waiting requests for each replica beyond which one more is started."""
    utilization: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of `max-num-seqs` that running and waiting requests together may fill on the replicas that stay
    when one is taken away."""
    cooldown: Seconds = 300.0
    """How long the load must have been lower before a replica is taken away."""


class Job(Part):
    """Work that nobody waits for, as the nightly indexing of documents: a file of requests, in the format of
    OpenAI's batches, that is run against the gateway."""

    schedule: Annotated[str, Field(pattern=r"^(@\w+|\S+( \S+){4})$")] | None = None
    """As cron has it (`0 2 * * *`, UTC); run once if not given."""
    input: Annotated[str, Field(pattern=r"^/")]
    """The file (JSONL), in the container."""
    output: Annotated[str, Field(pattern=r"^/")]
    """Where answers are written."""
    volume: Label
    """The PersistentVolumeClaim with both, mounted at the input's folder."""
    key_secret: Label
    """The Secret whose entry `key` is the gateway's key for this work."""
    deadline: Seconds = 6 * 3600.0
    """How long it may take."""


class Images(Part):
    """Container images, pinned: a tag that stays, or a digest."""

    registry: str = ""
    """Put before Penstock's own, as `registry.example.com/llm`."""
    penstock: Image | None = None
    """Engine on CPUs, gateway and jobs; `penstock:VERSION-cpu` in the registry if not given."""
    penstock_cuda: Image | None = None
    """Engine on GPUs; `penstock:VERSION-cuda` if not given."""
    vllm: Image = "vllm/vllm-openai:v0.32.0"
    """Engine of models with `engine: vllm`."""
    pull_secret: Label | None = None
    """The Secret with the registry's credentials."""


class Storage(Part):
    """Where weights are kept: one volume, written once, read by all."""

    storage_class: Label | None = None
    """The cluster's default if not given. It must allow the access mode."""
    access: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """ReadWriteOnce where all pods are on one node, or each fetches for itself."""
    size: Bytes | None = None
    """Reckoned from the weights if not given."""
    token_secret: Label | None = None
    """The Secret whose entry `token` is the Hugging Face token."""


class Tls(Part):
    """The certificate of the entry: exactly one of the two."""

    issuer: Label | None = None
    """A ClusterIssuer of cert-manager, which makes it."""
    secret: Label | None = None
    """A Secret (`kubernetes.io/tls`) that is there already."""


class Entry(Part):
    """How clients reach the gateway from outside."""

    kind: Literal["ingress", "gateway-api"] = "ingress"
    """Ingress, or an HTTPRoute of the Gateway API."""
    host: Host
    """As `llm.example.com`."""
    class_name: Label | None = None
    """IngressClass (`nginx`), or the name of the Gateway that the route joins; the latter must be given."""
    gateway_namespace: Label | None = None
    """Of that Gateway, where it is in another namespace."""
    gateway_class: Label | None = None
    """GatewayClass of that Gateway, as `eg` or `istio`; on GKE one of GKE's own (`gke-l7-…`) if not given."""
    tls: Tls | None = None
    """Plain HTTP if not given."""


class Cluster(Part):
    """The Kubernetes cluster that `penstock compile` writes for."""

    namespace: Label = "llm-serving"
    """Everything is in it."""
    provider: Literal["aks", "eks", "gke", "other"] = "other"
    """Whose labels and taints nodes have."""
    entry: Entry | None = None
    """None: the gateway is reached from within, or by port-forward."""
    images: Images = Images()
    """What is run."""
    storage: Storage = Storage()
    """Where weights are kept."""
    autoscaler: Literal["keda", "hpa"] = "keda"
    """What follows a model's `scale`: KEDA, or a HorizontalPodAutoscaler with prometheus-adapter."""
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    """Where KEDA asks for metrics."""
    prometheus_labels: dict[LabelKey, LabelValue] = {"release": "kube-prometheus-stack"}
    """Labels by which the Prometheus operator finds ServiceMonitors and rules."""
    monitoring_namespace: Label = "monitoring"
    """Whose pods may read metrics."""
    gateway_replicas: Annotated[int, Field(ge=1)] | None = None
    """Two where the ledger is in PostgreSQL, one where it is in SQLite, if not given."""
    secret: Label = "penstock-secrets"
    """The Secret with the environment variables that this file names (`api_key_env` and its like) and
    PENSTOCK_LEDGER_PASSWORD, each under its own name."""
    drain: Seconds = 300.0
    """How long requests under way may take to end when a pod is stopped."""
    load_time: Seconds | None = None
    """How long an engine may take to load its weights; reckoned from their size if not given."""
