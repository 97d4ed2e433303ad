"""Pods that serve models: devices, memory, weights, replicas (S95, T18)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from penstock.fleet import catalogue

from .cluster import Container, Objects, Pod, integer, items, mapping, quantity, selects
from .containers import SHM
from .finding import Finding, Rule, Severity
from .nodes import chosen
from .scalers import least, most
from .serving import Engine, containers_of_others, engine_of, engines_of

TENSOR_PARALLEL = Rule(
    "gpu-count",
    Severity.ERROR,
    "tensor and pipeline parallel sizes that are not the pod's number of GPUs",
    "With too few the engine does not start (invalid device ordinal); with too many, GPUs are paid for "
    "and idle.",
    "--tensor-parallel-size × --pipeline-parallel-size = GPUs of the replica.",
)
NO_DEVICE = Rule(
    "device-missing",
    Severity.WARNING,
    "an engine that chooses nodes with GPUs, and asks for none",
    "It gets none, and ends at its start; or, where the runtime shows it all of them, it takes memory that "
    "the scheduler has given to others.",
    "limits: {nvidia.com/gpu: 1}",
)
MIG_COUNT = Rule(
    "mig-parallel",
    Severity.ERROR,
    "several MIG slices for one engine",
    "CUDA shows a process one slice only, and NCCL does not work between slices: the engine does not start.",
    "One slice for each replica, a larger slice, or whole GPUs.",
)
MIG = Rule(
    "mig-resource",
    Severity.ERROR,
    "a MIG slice that is asked for as a whole GPU, or that does not exist",
    "With the device plugin's strategy `mixed`, slices are resources of their own: the pod waits for a whole "
    "GPU for ever, or takes one (T18).",
    "Ask for nvidia.com/mig-PROFILE, as nvidia.com/mig-3g.40gb.",
)
DEVICES = Rule(
    "device-requests",
    Severity.ERROR,
    "devices whose request is not their limit, or no whole number",
    "The API server refuses it: devices are not shared or overcommitted.",
    "Write devices under limits only.",
)
REQUESTS = Rule(
    "requests-over-limits",
    Severity.ERROR,
    "a request above its limit",
    "The API server refuses the pod.",
    "Raise the limit, or lower the request.",
)
RESOURCES = Rule(
    "resources-missing",
    Severity.WARNING,
    "an engine without a request for CPU or memory",
    "The scheduler puts it onto a node that is full; it is the first to be killed when memory is short, and "
    "waits for CPUs while the GPU idles.",
    "Requests of cpu and memory: 7B about 20Gi, 70B about 80Gi (S98).",
)
MEMORY = Rule(
    "memory-small",
    Severity.WARNING,
    "a memory limit that is far below what an engine of this size needs",
    "Weights pass through the host's memory on their way to the device: the container is killed (OOMKilled) "
    "while it loads.",
    "Requests and limits of memory: 7B about 20Gi, 70B about 80Gi (S98).",
)
SHM_LIMIT = Rule(
    "shm-memory",
    Severity.ERROR,
    "a /dev/shm that is larger than the container's memory, or no memory at all",
    "What is written to it counts as the container's memory: it is killed before /dev/shm is full; on a disk "
    "it is slow.",
    "medium: Memory, and a sizeLimit below the memory limit.",
)
WEIGHTS = Rule(
    "weights-uncached",
    Severity.WARNING,
    "an engine that fetches its weights at each start",
    "Each start and each replica downloads gigabytes before it serves: minutes in which the load has no "
    "help, and the hub may be away.",
    "Keep weights on a PersistentVolumeClaim, mounted at /root/.cache/huggingface (or HF_HOME).",
)
SINGLE = Rule(
    "single-replica",
    Severity.WARNING,
    "one replica of an engine",
    "When its node goes or a new version comes, nobody serves.",
    "At least two replicas, of floor and burst together.",
)
SPREAD = Rule(
    "spread-missing",
    Severity.WARNING,
    "replicas that may all be on one node",
    "One node that goes takes all of them.",
    "podAntiAffinity or topologySpreadConstraints over kubernetes.io/hostname and the zone.",
)
SPREAD_LABELS = Rule(
    "spread-selects-nothing",
    Severity.ERROR,
    "an anti-affinity or a spread that does not select its own pods",
    "It has no effect.",
    "Write the selector as a part of the pod's own labels.",
)
SHARED = Rule(
    "time-slicing",
    Severity.WARNING,
    "an engine on a GPU that is shared by time-slicing",
    "No isolation of memory or time: latency is what the neighbours leave, and one of them can take all "
    "memory. For development only (S4).",
    "Whole GPUs, or MIG slices.",
)
RULES = (
    TENSOR_PARALLEL, NO_DEVICE, MIG_COUNT, MIG, DEVICES, REQUESTS, RESOURCES, MEMORY, SHM_LIMIT, WEIGHTS,
    SINGLE, SPREAD, SPREAD_LABELS, SHARED,
)  # fmt: skip

_SHM = 128 * 2**20
"""Bytes of /dev/shm below which even an engine on one device runs out: Docker's default is half of it."""
_CACHES = ("/root/.cache/huggingface", "/huggingface", "/.cache/huggingface")
_GPU_NODES = frozenset(("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator"))
_PROFILE = re.compile(r"nvidia\.com/mig-(.+)")
_EXTENDED = re.compile(r"(?!kubernetes\.io/|.*\.kubernetes\.io/)[a-z0-9.-]+/.+")


def examine(objects: Objects) -> Iterator[Finding]:
    """What is wrong with the pods of engines, and with the resources of all."""
    for pod in objects.pods:
        for container in pod.all_containers:
            yield from _amounts(container)
        yield from _spread_labels(pod)
    engines = engines_of(objects)
    for engine in engines:
        yield from _parallel(engine)
        yield from _device(engine)
        yield from _mig(engine)
        yield from _memory(engine)
        yield from _weights(engine, objects)
    for container in containers_of_others(objects):
        yield from _amounts(container)
        foreign = engine_of(container, objects)
        if foreign is not None and _is_alone(foreign):
            yield from _parallel(foreign)
            yield from _mig(foreign)
    seen: set[int] = set()
    for engine in engines:
        if id(engine.container.pod.owner) not in seen:
            seen.add(id(engine.container.pod.owner))
            yield from _replicas(engine, objects)


def _is_alone(engine: Engine) -> bool:
    """Whether an engine of KServe's says itself over how many devices of its own pod it is divided; else its
    controller does, from `parallelism`, `worker` or `workerSpec`."""
    thing = engine.container.pod.owner
    spread = ("parallelism", "worker", "prefill", "predictor.workerSpec")
    if thing.group != "serving.kserve.io" or any(
        thing.get("spec", *name.split(".")) is not None for name in spread
    ):
        return False
    return engine.flag("--tensor-parallel-size", "-tp") is not None


def _amounts(container: Container) -> Iterator[Finding]:
    limits = mapping(container.get("resources", "limits"))
    requests = mapping(container.get("resources", "requests"))
    for name in {**limits, **requests}:
        keys = ("resources", "limits" if name in limits else "requests", name)
        low, high = quantity(requests.get(name)), quantity(limits.get(name))
        if _EXTENDED.fullmatch(name):
            value = high if high is not None else low
            if value is not None and value != int(value):
                yield container.finding(DEVICES, f"{name}: {value:g} is no whole number.", *keys)
            elif name in requests and name not in limits:
                yield container.finding(DEVICES, f"{name} is requested without a limit.", *keys)
            elif low is not None and high is not None and low != high:
                what = f"{name}: {requests[name]} requested, the limit is {limits[name]}."
                yield container.finding(DEVICES, what, "resources", "requests", name)
        elif low is not None and high is not None and low > high:
            what = f"{container.name} requests {name}: {requests[name]} with a limit of {limits[name]}."
            yield container.finding(REQUESTS, what, "resources", "requests", name)
        profile = _PROFILE.fullmatch(name)
        known = _profiles()
        if profile and profile[1] not in known:
            yield container.finding(
                MIG, f"There is no profile {profile[1]}; there are {', '.join(known)}.", *keys
            )


def _profiles() -> list[str]:
    return sorted({each.name for device in catalogue.devices().values() for each in device.mig})


def _parallel(engine: Engine) -> Iterator[Finding]:
    container = engine.container
    devices = container.devices()
    asked = [value for name in ("--tensor-parallel-size", "-tp") if (value := engine.flag(name)) is not None]
    if asked and not asked[0].isdigit():
        return  # a variable that is not known here
    tensor = int(asked[0]) if asked else 1
    pipeline = engine.number("--pipeline-parallel-size", "-pp") or 1
    data = engine.number("--data-parallel-size", "-dp") or 1
    owner = container.pod.owner
    nodes = 1
    if owner.kind == "LeaderWorkerSet":
        nodes = integer(owner.get("spec", "leaderWorkerTemplate", "size")) or 1
    elif pipeline > 1 and engine.flag("--distributed-executor-backend") == "ray":
        return  # on how many nodes, Ray says
    have = engine.devices * nodes
    if not have:
        return
    if any(_PROFILE.fullmatch(name) for name in devices) and have > 1:
        yield container.finding(MIG_COUNT, f"{engine.devices} slices for one engine.", "resources", "limits")
        return
    want = tensor * pipeline * data
    local = engine.number("--data-parallel-size-local")
    if want != have and local is None:
        name = next(iter(devices))
        kind = "limits" if name in mapping(container.get("resources", "limits")) else "requests"
        sizes = f"tensor {tensor} × pipeline {pipeline}" + (f" × data {data}" if data > 1 else "")
        where = f"{engine.devices} × {nodes} nodes" if nodes > 1 else str(have)
        yield container.finding(
            TENSOR_PARALLEL,
            f"The engine wants {want} GPUs ({sizes}), the pod has {where}.",
            "resources",
            kind,
            name,
        )


def _device(engine: Engine) -> Iterator[Finding]:
    pod = engine.container.pod
    asked = [
        name
        for each in pod.all_containers
        for field in ("limits", "requests")
        for name in mapping(each.get("resources", field))
    ]
    # a claim of dynamic resource allocation, or any device by any name
    if pod.spec.get("resourceClaims") or any(map(_EXTENDED.fullmatch, asked)):
        return
    label = next((key for key, values, _ in chosen(pod) if values and key in _GPU_NODES), None)
    if label is not None:
        what = f"{engine.container.name} asks for no device; the pod chooses nodes by {label}."
        yield engine.container.finding(NO_DEVICE, what, "resources")


def _mig(engine: Engine) -> Iterator[Finding]:
    container, pod = engine.container, engine.container.pod
    if "nvidia.com/gpu" in container.devices():
        hints = {**mapping(pod.spec.get("nodeSelector"))}
        for key, value in hints.items():
            sliced = key.startswith("nvidia.com/mig-") or (
                key == "nvidia.com/mig.strategy" and value == "mixed"
            )
            if sliced or (key == "nvidia.com/mig.config" and value not in ("all-disabled", "")):
                yield container.finding(
                    MIG, f"The pod selects nodes with {key}: {value}, and asks for nvidia.com/gpu.",
                    "resources", "limits", "nvidia.com/gpu",
                )  # fmt: skip
                return
        for index, each in enumerate(items(container.data.get("env"))):
            name, value = mapping(each).get("name"), str(mapping(each).get("value"))
            if name in ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") and "MIG-" in value:
                what = "A slice is named in a variable, and a whole GPU is asked for."
                yield container.finding(MIG, what, "env", index)
    shared = [name for name in container.devices() if name.endswith(".shared")]
    selector = mapping(pod.spec.get("nodeSelector"))
    product = str(selector.get("nvidia.com/gpu.product") or "")
    if (shared or product.endswith("-SHARED")) and not _is_development(pod):
        name = shared[0] if shared else f"nvidia.com/gpu.product: {product}"
        yield container.finding(SHARED, f"{name} is a share of a GPU's time.", "resources", "limits")


def _is_development(pod: Pod) -> bool:
    said = " ".join(map(str, (*pod.owner.labels.values(), *pod.labels.values(), pod.owner.namespace)))
    return re.search(r"\b(dev|develop|development|test|sandbox|demo)\b", said) is not None


def _memory(engine: Engine) -> Iterator[Finding]:
    container = engine.container
    requests = {
        **mapping(container.get("resources", "limits")),
        **mapping(container.get("resources", "requests")),
    }
    absent = [name for name in ("cpu", "memory") if name not in requests]
    if absent:
        yield container.finding(
            RESOURCES, f"{container.name} requests no {' and no '.join(absent)}.", "resources"
        )
    if not engine.devices:
        return
    limit = quantity(mapping(container.get("resources", "limits")).get("memory"))
    needed = _host_bytes(engine)
    if limit is not None and needed is not None and limit < needed / 2:
        what = f"{container.get('resources', 'limits', 'memory')} for {engine.billions:g}B parameters."
        fix = f"memory: {math.ceil(needed / 2**30)}Gi"
        yield container.finding(MEMORY, what, "resources", "limits", "memory", fix=fix)
    volumes = container.pod.volumes
    for mount in items(container.data.get("volumeMounts")):
        if str(mapping(mount).get("mountPath")).rstrip("/") != "/dev/shm":
            continue
        index, volume = volumes.get(str(mapping(mount).get("name")), (-1, {}))
        if not (directory := mapping(volume.get("emptyDir"))) and "emptyDir" not in volume:
            return
        keys = ("spec", "volumes", index, "emptyDir")
        if directory.get("medium") != "Memory":
            yield container.pod.finding(SHM_LIMIT, "/dev/shm is on a disk.", *keys, fix="medium: Memory")
        size = quantity(directory.get("sizeLimit"))
        if size is not None and limit is not None and size > limit:
            yield container.pod.finding(
                SHM_LIMIT, f"/dev/shm has {directory['sizeLimit']}, the container "
                f"{container.get('resources', 'limits', 'memory')}.", *keys, "sizeLimit",
            )  # fmt: skip
        if size is not None and size < (2**30 if engine.devices > 1 else _SHM):
            devices = f"{engine.devices} GPUs" if engine.devices > 1 else "an engine"
            yield container.pod.finding(
                SHM, f"/dev/shm has {directory['sizeLimit']} for {devices}.", *keys, "sizeLimit"
            )
        return
    if container.pod.spec.get("hostIPC") is not True:
        yield container.finding(SHM, f"{container.name} mounts nothing at /dev/shm.", "volumeMounts")


def _host_bytes(engine: Engine) -> float | None:
    """Memory that the container of an engine should have: a line through S98's two points, 20 GiB of 7B and
    80 GiB of 70B; None where the size is unknown, or too small for that line."""
    size = engine.billions
    if size is None or size < 3:
        return None
    scheme = (engine.flag("--quantization", "-q") or engine.model or "").lower()
    size *= 0.5 if re.search("fp8|int8|w8", scheme) else 0.25 if re.search("awq|gptq|int4|fp4", scheme) else 1
    return (13.3 + 0.95 * size) * 2**30


def _weights(engine: Engine, objects: Objects) -> Iterator[Finding]:
    if not engine.is_remote:
        return
    container = engine.container
    paths = [*_CACHES]
    for each in items(container.data.get("env")):
        if mapping(each).get("name") in ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "XDG_CACHE_HOME"):
            paths.append(str(mapping(each).get("value")))
        elif mapping(each).get("name") == "HOME":
            paths.append(f"{mapping(each).get('value')}/.cache/huggingface")
    if engine.flag("--download-dir"):
        paths.append(str(engine.flag("--download-dir")))
    volumes = container.pod.volumes
    for mount in items(container.data.get("volumeMounts")):
        path = str(mapping(mount).get("mountPath")).rstrip("/")
        _, volume = volumes.get(str(mapping(mount).get("name")), (-1, {}))
        lasting = bool(volume) and not any(
            key in volume for key in ("emptyDir", "configMap", "secret", "downwardAPI", "projected")
        )
        if (
            lasting
            and path
            and any(
                each == path or each.startswith(f"{path}/") or path.startswith(f"{each}/") for each in paths
            )
        ):
            return
    key = "args" if container.get("args") else "command"
    yield container.finding(WEIGHTS, f"{engine.model} is fetched into the container's own layer.", key)


def _replicas(engine: Engine, objects: Objects) -> Iterator[Finding]:
    pod = engine.container.pod
    owner = pod.owner
    if owner.kind not in ("Deployment", "StatefulSet", "LeaderWorkerSet", "Rollout", "ReplicaSet"):
        return
    services = objects.services_of(pod)
    together = {id(pod.owner): pod}
    for service in services:
        together |= {id(each.owner): each for each in objects.behind(service)}
    floor = sum(least(objects, each) for each in together.values())
    steady = max(pod.replicas, least(objects, pod))
    if pod.replicas and floor < 2 and not _is_burst(pod, together):
        scaler = "" if steady == 1 else " at the least"
        yield owner.finding(SINGLE, f"{owner.title} has {max(floor, 1)} replica{scaler}.", "spec", "replicas")
    if most(objects, pod) >= 2 and owner.kind != "StatefulSet" and not _spreads(pod):
        yield pod.finding(SPREAD, f"The pods of {owner.title} may all be on one node.", "spec")


def _is_burst(pod: Pod, together: dict[int, Pod]) -> bool:
    """Whether others behind the same Service stay: then this one may be none."""
    return any(each is not pod and each.replicas > 0 for each in together.values()) and pod.replicas <= 1


def _spreads(pod: Pod) -> bool:
    rules = mapping(mapping(pod.spec.get("affinity")).get("podAntiAffinity"))
    return bool(
        items(pod.spec.get("topologySpreadConstraints"))
        or items(rules.get("requiredDuringSchedulingIgnoredDuringExecution"))
        or items(rules.get("preferredDuringSchedulingIgnoredDuringExecution"))
    )


def _spread_labels(pod: Pod) -> Iterator[Finding]:
    top = ("spec", "topologySpreadConstraints")
    for index, each in enumerate(items(pod.spec.get("topologySpreadConstraints"))):
        selector = mapping(each).get("labelSelector")
        if selector is not None and not selects(selector, pod.labels):
            yield pod.finding(
                SPREAD_LABELS, "The spread does not select its own pods.", *top, index, "labelSelector"
            )
    rules = mapping(mapping(pod.spec.get("affinity")).get("podAntiAffinity"))
    for name, inner in (
        ("requiredDuringSchedulingIgnoredDuringExecution", ()),
        ("preferredDuringSchedulingIgnoredDuringExecution", ("podAffinityTerm",)),
    ):
        for index, each in enumerate(items(rules.get(name))):
            term = mapping(mapping(each).get(inner[0])) if inner else mapping(each)
            own = set(mapping(mapping(term.get("labelSelector")).get("matchLabels"))) & set(pod.labels)
            if own and not selects(term.get("labelSelector"), pod.labels):
                keys = ("spec", "affinity", "podAntiAffinity", name, index, *inner, "labelSelector")
                yield pod.finding(SPREAD_LABELS, "The anti-affinity does not select its own pods.", *keys)
