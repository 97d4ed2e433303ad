"""Engines: for each workload a Deployment, or a LeaderWorkerSet where a replica has several nodes; for each
model a Service and a PodDisruptionBudget over floor and burst.

    model ─┬─ Service, PodDisruptionBudget
           ├─ floor (or all)  ─▶ ConfigMap of arguments ─▶ Deployment
           └─ burst           ─▶ ConfigMap of arguments ─▶ Deployment, whose replicas an autoscaler decides
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from . import names, pods, storage
from .objects import kinds
from .objects.base import Metadata, Object
from .objects.pod import (
    Container,
    EmptyDir,
    Env,
    EnvFrom,
    Handler,
    LabelSelector,
    Lifecycle,
    Mount,
    NameRef,
    PodSpec,
    PodTemplate,
    Port,
    Probe,
    Sleep,
    TemplateMetadata,
    Volume,
)
from .pods import metadata
from .workloads import ENGINE_KEY, Bundle, Workload

_STARTUP_PERIOD = 5
"""Seconds: a pod serves this long after its engine is ready, at most (T15)."""
_GROUP_PORT = 29501
"""Of torch's rendezvous between the nodes of a replica; vLLM's default."""
ROLE = "penstock.dev/role"
"""leader or worker, in a LeaderWorkerSet."""


def objects(bundle: Bundle) -> Iterator[Object]:
    """All of them, model by model."""
    for slug in dict.fromkeys(workload.slug for workload in bundle.workloads):
        parts = bundle.of(slug)
        yield _service(bundle, parts[0])
        yield _budget(bundle, parts[0])
        for workload in parts:
            yield _arguments(bundle, workload)
            yield _group(bundle, workload) if workload.nodes > 1 else _deployment(bundle, workload)


def selector(workload: Workload) -> dict[str, str]:
    """Labels by which a Deployment knows its pods; they never change."""
    return {names.INSTANCE: workload.name, names.COMPONENT: "engine"}


def model_selector(slug: str) -> dict[str, str]:
    """Labels of all pods of a model."""
    return {names.COMPONENT: "engine", names.MODEL: slug}


def _of_model(bundle: Bundle, workload: Workload) -> Metadata:
    """Of what all replicas of a model have together."""
    labels = names.labels("engine", workload.slug, bundle.namespace, model=workload.slug)
    return metadata(bundle, workload.slug, labels)


def _service(bundle: Bundle, workload: Workload) -> Object:
    selected = model_selector(workload.slug)
    if workload.nodes > 1:
        selected[ROLE] = "leader"  # workers answer no requests
    return kinds.service(
        _of_model(bundle, workload),
        kinds.ServiceSpec(
            type="ClusterIP",
            cluster_ip="None",  # the gateway chooses the replica, by its cache and its queue
            selector=selected,
            ports=(kinds.ServicePort(name=names.PORT, port=workload.port, target_port=names.PORT),),
        ),
    )


def _budget(bundle: Bundle, workload: Workload) -> Object:
    """One pod at a time may be drained, whatever the number: a budget of `minAvailable` that is no less than
    the replicas there are would hold up every drain (T9)."""
    return kinds.disruption_budget(
        _of_model(bundle, workload),
        kinds.BudgetSpec(
            max_unavailable=1,
            unhealthy_pod_eviction_policy="AlwaysAllow",
            selector=LabelSelector(match_labels=model_selector(workload.slug)),
        ),
    )


def variables(workload: Workload) -> dict[str, str]:
    """The launch arguments with one value, as entries of a ConfigMap."""
    return {_variable(flag.name): flag.values[0] for flag in workload.flags if len(flag.values) == 1}


def _variable(flag: str) -> str:
    return "ENGINE_" + flag.upper().replace("-", "_").replace(".", "_")


def _arguments(bundle: Bundle, workload: Workload) -> Object:
    return kinds.config_map(
        metadata(bundle, f"{workload.name}-arguments", workload.labels), variables(workload)
    )


def command(workload: Workload) -> tuple[str, ...]:
    """What the container runs, with references to the ConfigMap's entries; every flag is there by its name.

    That engines' own variables decide nothing (T17) is why flags refer to entries.
    """
    words = [
        workload.weights_path,
        "--host=0.0.0.0",
        f"--port={workload.port}",
        f"--served-model-name={workload.model_name}",
    ]
    for flag in workload.flags:
        if len(flag.values) == 1:
            words.append(f"--{flag.name}=$({_variable(flag.name)})")
        else:
            words += [f"--{flag.name}", *flag.values]
    return tuple(words)


def _template(bundle: Bundle, workload: Workload, role: str | None = None) -> PodTemplate:
    """The pods of a workload. `role`: of a node in a LeaderWorkerSet."""
    digest = hashlib.blake2b(repr(variables(workload)).encode(), digest_size=8).hexdigest()
    labels = dict(workload.labels)
    if role is not None:
        labels[ROLE] = role
    own, mounts = pods.scratch()
    weights, weight_mounts = storage.engine_volumes(bundle, workload)
    container = Container(
        name="engine",
        image=workload.image,
        command=("penstock", "serve") if workload.engine == "penstock" else ("vllm", "serve"),
        args=(*command(workload), *_rendezvous(workload, role)),
        env_from=(EnvFrom(config_map_ref=NameRef(name=f"{workload.name}-arguments")),),
        env=_environment(bundle, workload),
        ports=() if role == "worker" else (Port(name=names.PORT, container_port=workload.port),),
        **({} if role == "worker" else _probes(workload)),
        lifecycle=None
        if role == "worker"
        else Lifecycle(pre_stop=Handler(sleep=Sleep(seconds=workload.pre_stop))),
        resources=pods.resources(
            cpus=str(workload.cpus),
            memory=workload.memory,
            device=workload.resource,
            devices=workload.devices_per_node,
        ),
        security_context=pods.RESTRICTED,
        volume_mounts=(Mount(name="shm", mount_path="/dev/shm"), *mounts, *weight_mounts),
    )
    return PodTemplate(
        metadata=TemplateMetadata(labels=labels, annotations={"penstock.dev/arguments": digest}),
        spec=PodSpec(
            service_account_name="engine",
            automount_service_account_token=False,
            enable_service_links=False,  # of a Service `vllm` they would be vLLM's own variables
            termination_grace_period_seconds=workload.grace,
            image_pull_secrets=pods.pull_secrets(bundle),
            security_context=pods.POD_SECURITY,
            node_selector=pods.node_selector(workload.pool),
            affinity=pods.apart(model_selector(workload.slug), pods.nodes(bundle, workload)),
            tolerations=pods.tolerations(workload.taints),
            topology_spread_constraints=pods.spread(model_selector(workload.slug)) if role is None else (),
            init_containers=storage.init_containers(bundle, workload),
            containers=(container,),
            volumes=(
                Volume(
                    name="shm", empty_dir=EmptyDir(medium="Memory", size_limit=pods.quantity(workload.shm))
                ),
                *own,
                *weights,
            ),
        ),
    )


def _environment(bundle: Bundle, workload: Workload) -> tuple[Env, ...]:
    own = "PENSTOCK_GATEWAY_KEY" if workload.engine == "penstock" else "VLLM_API_KEY"
    found = [pods.secret_env(bundle, own, ENGINE_KEY), *pods.home_env()]
    if workload.weights != "demo":
        # nothing is asked of the hub: what is served is what is on the volume
        found += [Env(name="HF_HUB_OFFLINE", value="1"), Env(name="TRANSFORMERS_OFFLINE", value="1")]
    if workload.engine == "vllm":
        found.append(Env(name="VLLM_NO_USAGE_STATS", value="1"))
    return tuple(found)


def _rendezvous(workload: Workload, role: str | None) -> tuple[str, ...]:
    """How the nodes of a replica find one another. LeaderWorkerSet sets the variables."""
    if role is None:
        return ()
    meet = (
        f"--nnodes={workload.nodes}",
        "--node-rank=$(LWS_WORKER_INDEX)",
        "--master-addr=$(LWS_LEADER_ADDRESS)",
        f"--master-port={_GROUP_PORT}",
        "--distributed-executor-backend=mp",
    )
    return (*meet, "--headless") if role == "worker" else meet


def _probes(workload: Workload) -> dict[str, Probe]:
    """Until it has started, only the startup probe asks; its patience is the time that loading may take.
    An engine that is busy is alive: ours is told from one that hangs by its steps."""

    return {
        "startup_probe": pods.probe(
            workload.ready_path,
            period=_STARTUP_PERIOD,
            timeout=3,
            failures=math.ceil(workload.load_time / _STARTUP_PERIOD),
        ),
        "readiness_probe": pods.probe(workload.ready_path, period=5, timeout=3, failures=2),
        "liveness_probe": pods.probe(workload.live_path, period=10, timeout=5, failures=3),
    }


def _strategy(workload: Workload) -> tuple[int, int]:
    """(surge, unavailable): one more first where its pool has a replica's devices free, else one fewer: a
    surge would wait for devices for ever (T12)."""
    return (1, 0) if workload.surge > 0 else (0, 1)


def _free(workload: Workload) -> dict[str, str]:
    """What a surge is reckoned with."""
    return {names.FREE_DEVICES: str(workload.surge * workload.devices)} if workload.devices else {}


def _replicas(workload: Workload) -> int | None:
    """None where an autoscaler decides: applying again does not set them back."""
    return None if workload.scaled else workload.replicas


def _deployment(bundle: Bundle, workload: Workload) -> Object:
    surge, unavailable = _strategy(workload)
    alone = surge == 0 and workload.max_replicas == 1
    return kinds.deployment(
        metadata(bundle, workload.name, workload.labels, _free(workload)),
        kinds.DeploymentSpec(
            replicas=_replicas(workload),
            selector=LabelSelector(match_labels=selector(workload)),
            strategy=kinds.Strategy(type="Recreate")
            if alone
            else kinds.Strategy(
                type="RollingUpdate",
                rolling_update=kinds.RollingUpdate(max_surge=surge, max_unavailable=unavailable),
            ),
            progress_deadline_seconds=_progress(bundle, workload),
            revision_history_limit=5,
            template=_template(bundle, workload),
        ),
    )


def _progress(bundle: Bundle, workload: Workload) -> int:
    """Until a rollout counts as failed: the old pod ends, the new one is scheduled and its image pulled, its
    weights come, and are loaded."""
    return workload.grace + storage.wait(bundle, workload) + math.ceil(workload.load_time) + 600


def _group(bundle: Bundle, workload: Workload) -> Object:
    surge, unavailable = _strategy(workload)
    return kinds.leader_worker_set(
        metadata(bundle, workload.name, workload.labels, _free(workload)),
        kinds.LeaderWorkerSetSpec(
            replicas=_replicas(workload),
            leader_worker_template=kinds.LeaderWorkerTemplate(
                size=workload.nodes,
                restart_policy="RecreateGroupOnPodRestart",
                leader_template=_template(bundle, workload, "leader"),
                worker_template=_template(bundle, workload, "worker"),
            ),
            rollout_strategy=kinds.GroupStrategy(
                type="RollingUpdate",
                rolling_update_configuration=kinds.GroupRollingUpdate(
                    max_surge=surge, max_unavailable=unavailable
                ),
            ),
            startup_policy="LeaderCreated",
        ),
    )
