"""What a compiled bundle consists of, with everything decided that its files need.

    Bundle ─┬─ workloads   engines: floor, burst, or all replicas alike
            ├─ gateway     its image, ledger, secrets
            └─ assumed     what nobody said

`resolve` makes them of a spec; objects and files are written from them alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.fleet.hardware import Device
from penstock.spec.cluster import Taint
from penstock.spec.model import Pool, Slo, Spec

from . import names
from .flags import Flag

Tier = Literal["floor", "burst", "all"]

PORT = 8000
"""Of engines."""
PRE_STOP = 15
"""Seconds between the moment in which a pod is taken out of its Service and the one in which it is told to
end: until every proxy has heard of it, requests still come."""
SPARE = 15
"""Seconds of the grace period beyond preStop and drain, to end processes."""
ENGINE_KEY = "PENSTOCK_ENGINE_KEY"
"""Entry of the Secret that engines ask for, and the gateway presents."""
TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Entry of the Secret with the address that spans are sent to, where `gateway.tracing` wants them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Replicas of one model on one pool: a Deployment, or a LeaderWorkerSet where a replica has several
    nodes."""

    name: str
    """Of the Deployment: the model's slug, and -burst for what is scaled beyond the floor. A LeaderWorkerSet
    has the slug and -nodes."""
    slug: str
    """Of the model: the Service's name, which selects floor and burst."""
    model_name: str
    """As requests call it; the key under models:."""
    weights: str
    """As the spec names them: an id of Hugging Face, a folder, `demo`."""
    weights_path: str
    """What the engine is given: a folder on the volume, or `demo`."""
    weights_bytes: int
    """As stored; 0 where they are in the image."""
    engine: Literal["penstock", "vllm"]
    image: str
    pool_name: str
    pool: Pool
    device: Device
    tier: Tier
    replicas: int
    """At the beginning."""
    min_replicas: int
    max_replicas: int
    """The same three for what is not scaled."""
    nodes: int
    """Of a replica."""
    devices_per_node: int
    """0 on a CPU."""
    resource: str | None
    """What each node's pod asks for, as nvidia.com/gpu or nvidia.com/mig-3g.40gb; None on a CPU."""
    flags: tuple[Flag, ...]
    """Of the engine, beside model, host, port and name."""
    max_model_len: int
    max_num_seqs: int
    memory: int
    """Bytes of RAM of a pod."""
    cpus: int
    """Cores of a pod."""
    shm: int
    """Bytes of /dev/shm."""
    load_time: float
    """Seconds that loading may take."""
    drain: float
    """Seconds that requests get when a pod is stopped; fewer on spot nodes, which do not wait."""
    pre_stop: int
    """Seconds before that."""
    taints: tuple[Taint, ...]
    """What its pods tolerate."""
    device_labels: tuple[str, tuple[str, ...]] | None
    """(label, values) of nodes with its devices."""
    surge: int
    """Replicas that a rollout may start before it ends old ones: what the pool has free."""
    slo: Slo | None
    utilization_target: float | None = None
    """As the spec's scale."""
    waiting_target: int | None = None
    """As the spec's scale."""
    cooldown: float | None = None
    """As the spec's scale."""
    namespace: str
    port: int = PORT

    @property
    def devices(self) -> int:
        """Of a replica, over all nodes."""
        return self.devices_per_node * self.nodes

    @property
    def spot(self) -> bool:
        return self.pool.purchase == "spot"

    @property
    def grace(self) -> int:
        """terminationGracePeriodSeconds: preStop, drain, and something to end."""
        return self.pre_stop + math.ceil(self.drain) + SPARE

    @property
    def scaled(self) -> bool:
        """Whether something else than this file decides the number of replicas."""
        return self.max_replicas > self.min_replicas

    @property
    def args(self) -> tuple[str, ...]:
        """The flags as a command line."""
        return tuple(word for flag in self.flags for word in flag.words)

    @property
    def labels(self) -> dict[str, str]:
        """Of its objects and pods."""
        return names.labels("engine", self.name, self.namespace, model=self.slug, tier=self.tier)

    @property
    def ready_path(self) -> str:
        """Answers 200 once requests are taken."""
        return "/readyz" if self.engine == "penstock" else "/health"

    @property
    def live_path(self) -> str:
        """Answers 200 while it makes progress. vLLM's says only that its process lives (T14): whether it gets
        on is watched by an alert, and by the gateway."""
        return "/livez" if self.engine == "penstock" else "/health"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPlan:
    """The gateway's Deployment."""

    image: str
    replicas: int
    workers: int
    port: int
    admin_port: int | None
    database: Literal["sqlite", "postgresql"]
    drain: float
    pre_stop: int = PRE_STOP
    secrets: tuple[str, ...]
    """Environment variables that come from the Secret `cluster.secret`."""

    @property
    def grace(self) -> int:
        return self.pre_stop + math.ceil(self.drain) + SPARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Everything that is compiled."""

    spec: Spec
    namespace: str
    workloads: tuple[Workload, ...]
    gateway: GatewayPlan
    slugs: Mapping[str, str]
    """Model → its slug."""
    images: Mapping[str, str]
    """penstock, penstock_cuda, vllm → image."""
    assumed: tuple[str, ...]
    """What nobody said, in words; told with the files."""
    claimed: int = 0
    """Bytes of the claim for weights as it was made earlier: Kubernetes makes none smaller."""

    def of(self, slug: str) -> tuple[Workload, ...]:
        """A model's workloads: floor and burst, or one."""
        return tuple(each for each in self.workloads if each.slug == slug)
