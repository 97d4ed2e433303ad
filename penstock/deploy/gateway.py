"""The gateway: a Deployment with its own file and its own ledger, and the one Service that clients reach.

ConfigMap gateway (penstock.yaml) ─▶ Deployment gateway ─▶ Service gateway: http, admin
SQLite:      one pod, its database and journals on a claim; it is replaced, never doubled
PostgreSQL:  several pods, which share the database; journals on each pod's own disk
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from penstock.fleet.hardware import GIB

from . import google, names, pods
from .derive import CONFIG, STATE, derived
from .objects import kinds
from .objects.base import Object
from .objects.pod import (
    ClaimSpec,
    ClaimVolume,
    ConfigMapVolume,
    Container,
    EmptyDir,
    Handler,
    LabelSelector,
    Lifecycle,
    Mount,
    PodSpec,
    PodTemplate,
    Port,
    Resources,
    Sleep,
    TemplateMetadata,
    Volume,
)
from .pods import metadata
from .workloads import Bundle

LEDGER = "gateway-ledger"
"""Name of the claim with SQLite's file."""
_LEDGER_SIZE = 20 * GIB
_MEMORY, _MEMORY_EACH = GIB, GIB // 2
"""Bytes of the first process and of each further one; measured at 0.3 GiB under load."""


def selector() -> dict[str, str]:
    """Labels of its pods."""
    return {names.INSTANCE: names.GATEWAY, names.COMPONENT: "gateway"}


def objects(bundle: Bundle) -> Iterator[Object]:
    """Service, budget, configuration, ledger, Deployment."""
    labels = names.labels("gateway", names.GATEWAY, bundle.namespace)
    plan, text = bundle.gateway, derived(bundle)
    yield kinds.service(
        metadata(bundle, names.GATEWAY, labels, google.service_annotations(bundle)),
        kinds.ServiceSpec(
            type="ClusterIP",
            selector=selector(),
            ports=tuple(
                kinds.ServicePort(name=name, port=port, target_port=name) for name, port in _ports(bundle)
            ),
        ),
    )
    yield kinds.disruption_budget(
        metadata(bundle, names.GATEWAY, labels),
        kinds.BudgetSpec(
            max_unavailable=1,
            unhealthy_pod_eviction_policy="AlwaysAllow",
            selector=LabelSelector(match_labels=selector()),
        ),
    )
    yield kinds.config_map(metadata(bundle, names.GATEWAY, labels), {"penstock.yaml": text})
    if plan.database == "sqlite":
        yield kinds.claim(
            metadata(bundle, LEDGER, labels),
            ClaimSpec(
                access_modes=("ReadWriteOnce",),
                resources=Resources(requests={"storage": pods.quantity(_LEDGER_SIZE)}),
            ),
        )
    yield kinds.deployment(
        metadata(bundle, names.GATEWAY, labels),
        kinds.DeploymentSpec(
            replicas=plan.replicas,
            selector=LabelSelector(match_labels=selector()),
            strategy=kinds.Strategy(type="Recreate")  # two would have one file between them
            if plan.database == "sqlite"
            else kinds.Strategy(
                type="RollingUpdate", rolling_update=kinds.RollingUpdate(max_surge=1, max_unavailable=0)
            ),
            progress_deadline_seconds=plan.grace + 600,
            revision_history_limit=5,
            template=_template(bundle, labels, text),
        ),
    )


def _ports(bundle: Bundle) -> tuple[tuple[str, int], ...]:
    found = [(names.PORT, bundle.gateway.port)]
    if bundle.gateway.admin_port is not None:
        found.append((names.ADMIN_PORT, bundle.gateway.admin_port))
    return tuple(found)


def _template(bundle: Bundle, labels: dict[str, str], text: str) -> PodTemplate:
    plan = bundle.gateway
    own, mounts = pods.scratch(GIB)

    container = Container(
        name="gateway",
        image=plan.image,
        command=("penstock", "gateway"),
        args=(f"{CONFIG}/penstock.yaml", f"--shutdown-timeout={plan.drain:g}", "--log-format=json"),
        env=(*(pods.secret_env(bundle, each) for each in plan.secrets), *pods.home_env()),
        ports=tuple(Port(name=name, container_port=port) for name, port in _ports(bundle)),
        startup_probe=pods.probe("/readyz", period=2, timeout=2, failures=60),
        readiness_probe=pods.probe("/readyz", period=5, timeout=3, failures=2),
        liveness_probe=pods.probe("/livez", period=10, timeout=5, failures=3),
        lifecycle=Lifecycle(pre_stop=Handler(sleep=Sleep(seconds=plan.pre_stop))),
        resources=pods.resources(cpus=str(plan.workers), memory=_MEMORY + (plan.workers - 1) * _MEMORY_EACH),
        security_context=pods.RESTRICTED,
        volume_mounts=(
            Mount(name="config", mount_path=CONFIG, read_only=True),
            Mount(name="state", mount_path=STATE),
            *mounts,
        ),
    )
    state = (
        Volume(name="state", persistent_volume_claim=ClaimVolume(claim_name=LEDGER))
        if plan.database == "sqlite"
        else Volume(name="state", empty_dir=EmptyDir(size_limit=pods.quantity(_LEDGER_SIZE)))
    )
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return PodTemplate(
        metadata=TemplateMetadata(labels=labels, annotations={"penstock.dev/config": digest}),
        spec=PodSpec(
            service_account_name="gateway",
            automount_service_account_token=False,
            enable_service_links=False,
            termination_grace_period_seconds=plan.grace,
            image_pull_secrets=pods.pull_secrets(bundle),
            security_context=pods.POD_SECURITY,
            affinity=pods.apart(selector(), pods.on_demand(bundle)),
            topology_spread_constraints=pods.spread(selector()),
            containers=(container,),
            volumes=(
                Volume(name="config", config_map=ConfigMapVolume(name=names.GATEWAY)),
                state,
                *own,
            ),
        ),
    )
