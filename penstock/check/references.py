"""Names by which objects call one another: what is selected, mounted, scaled and called must be there.

A set of objects may be a part of what runs. So a name that leads nowhere is an error only where the set has
others of its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .cluster import Container, Objects, Pod, Thing, integer, items, listed, mapping, port_number, selects
from .finding import Finding, Rule, Severity
from .serving import engine_of, is_serving, undefined
from .words import is_unknown

DUPLICATE = Rule(
    "object-duplicate",
    Severity.ERROR,
    "the same object twice",
    "The last one that is applied wins, and takes back what the first has set.",
    "Keep one, or give it another name.",
)
VARIANT = Rule(
    "object-in-two-files",
    Severity.NOTE,
    "the same object in two files of a folder",
    "`kubectl apply -f FOLDER` applies both, and the last one wins.",
    "Keep one, or put variants into folders of their own.",
)
LABELS = Rule(
    "selector-mismatch",
    Severity.ERROR,
    "a workload whose selector is missing or does not match its own pods",
    "The API server refuses the object (T11).",
    "Write spec.selector.matchLabels as a part of spec.template.metadata.labels.",
)
SERVICE = Rule(
    "service-selects-nothing",
    Severity.ERROR,
    "a Service that selects no pod",
    "Whoever calls it gets no connection.",
    "Write spec.selector as a part of the labels of the pods.",
)
SERVICE_PORT = Rule(
    "service-port",
    Severity.ERROR,
    "a Service's port that leads to no port of its pods",
    "Connections to it are refused.",
    "Name a port of the container in targetPort.",
)
MONITOR = Rule(
    "monitor-selects-nothing",
    Severity.ERROR,
    "a ServiceMonitor or PodMonitor that selects nothing",
    "Prometheus scrapes nothing, alerts stay silent, and scalers see no load (T10).",
    "Write the selector as a part of the labels of the Service's metadata (PodMonitor: of the pods').",
)
MONITOR_PORT = Rule(
    "monitor-port",
    Severity.ERROR,
    "a monitor that names a port which its targets do not have",
    "Prometheus drops the target in silence and scrapes nothing (T10).",
    "Give the Service's port that name: `name: http`.",
)
MONITOR_PATH = Rule(
    "monitor-path",
    Severity.ERROR,
    "a monitor of engines or gateways at a path, or with a scheme, that they do not serve",
    "Prometheus gets 404, or no connection, and scrapes nothing: alerts stay silent, and scalers see no load "
    "(T10).",
    "path: /metrics, which is the default; scheme: https only for engines with --ssl-certfile.",
)
VARIABLE = Rule(
    "variable-undefined",
    Severity.ERROR,
    "a variable in args that the container does not have",
    "Kubernetes leaves `$(NAME)` as it stands, and the program gets that text.",
    "Define it under env or envFrom.",
)
VOLUME = Rule(
    "volume-missing",
    Severity.ERROR,
    "a volumeMount without its volume",
    "The API server refuses the pod.",
    "Add the volume under spec.volumes, or correct the name.",
)
MOUNT = Rule(
    "mount-twice",
    Severity.ERROR,
    "two mounts at one path of a container",
    "The API server refuses the pod.",
    "Give each a path of its own.",
)
UNUSED = Rule(
    "volume-unused",
    Severity.WARNING,
    "a volume that no container mounts",
    "What it was for is missing: /dev/shm is small, weights are fetched anew.",
    "Mount it, or drop it.",
)
PROBE = Rule(
    "probe-port",
    Severity.ERROR,
    "a probe of a port that its container does not have",
    "The probe fails for ever: the pod is never ready, or is restarted again and again.",
    "Name one of the container's ports.",
)
RULES = (
    DUPLICATE, VARIANT, LABELS, SERVICE, SERVICE_PORT, MONITOR, MONITOR_PORT, MONITOR_PATH, VARIABLE, VOLUME,
    MOUNT, UNUSED, PROBE,
)  # fmt: skip

_INJECTED = frozenset(("gke-gcsfuse-buffer", "gke-gcsfuse-cache", "gke-gcsfuse-tmp"))
"""Volumes of a sidecar that GKE adds to the pod."""


def examine(objects: Objects) -> Iterator[Finding]:
    """Names that lead nowhere."""
    yield from _duplicates(objects)
    for pod in objects.pods:
        yield from _labels(pod)
        for container in pod.all_containers:
            yield from _mounts(pod, container)
            yield from _probes(container)
            for name, word in undefined(container, objects):
                yield Finding(
                    VARIABLE, pod.owner.document.path, word.line, word.column,
                    f"{container.name} has no variable {name}: it gets the text $({name}).",
                )  # fmt: skip
        yield from _unused(pod)
    for service in objects.of("Service"):
        yield from _service(objects, service)
    for monitor in objects.of("ServiceMonitor", "PodMonitor"):
        yield from _monitor(objects, monitor)


def _duplicates(objects: Objects) -> Iterator[Finding]:
    seen: dict[tuple[str, str, str, str], Thing] = {}
    for thing in objects.things:
        if not thing.name:
            continue
        key = (thing.group, thing.kind, thing.namespace, thing.name)
        first = seen.setdefault(key, thing)
        here, there = thing.document.path, first.document.path
        line = first.document.at("metadata", "name")[0]
        if first is thing:
            continue
        if here == there:
            yield thing.finding(DUPLICATE, f"{thing.title} stands at line {line}, too.", "metadata", "name")
        elif here.rpartition("/")[0] == there.rpartition("/")[0]:
            # variants, often; other folders are an example and its copy, a base and another overlay
            what = f"{thing.title} stands at {there}:{line}, too."
            yield thing.finding(VARIANT, what, "metadata", "name")


def _labels(pod: Pod) -> Iterator[Finding]:
    owner = pod.owner
    if owner.kind not in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
        return
    selector = owner.get("spec", "selector")
    if selector is None:
        if owner.group == "apps":
            yield owner.finding(LABELS, f"{owner.title} has no spec.selector.", "spec")
    elif not selects(selector, pod.labels):
        yield owner.finding(
            LABELS, f"{owner.title} does not select its own pods: {_shown(pod.labels)}.", "spec", "selector"
        )


def _shown(labels: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items() if value is not None) or "no labels"


def _mounts(pod: Pod, container: Container) -> Iterator[Finding]:
    volumes = pod.volumes
    paths: dict[str, int] = {}
    for index, mount in enumerate(items(container.data.get("volumeMounts"))):
        entry = mapping(mount)
        name, path = str(entry.get("name")), entry.get("mountPath")
        if name not in volumes:
            yield container.finding(
                VOLUME,
                f"{container.name} mounts {name}; volumes are {listed(volumes)}.",
                "volumeMounts",
                index,
            )
        if isinstance(path, str):
            path = path.rstrip("/") or "/"
            if path in paths:
                yield container.finding(
                    MOUNT, f"{path} is mounted twice.", "volumeMounts", index, "mountPath"
                )
            paths[path] = index


def _unused(pod: Pod) -> Iterator[Finding]:
    mounted = {
        str(mapping(mount).get("name"))
        for each in pod.all_containers
        for mount in (*items(each.data.get("volumeMounts")), *items(each.data.get("volumeDevices")))
    }
    for name, (index, _) in pod.volumes.items():
        if name not in mounted and index >= 0 and pod.all_containers and name not in _INJECTED:
            yield pod.finding(UNUSED, f"No container mounts the volume {name}.", "spec", "volumes", index)


def _probes(container: Container) -> Iterator[Finding]:
    names = {str(port["name"]) for port in container.ports if "name" in port}
    numbers = {
        number for port in container.ports if (number := integer(port.get("containerPort"))) is not None
    }
    # programs of others may listen to ports that they do not declare
    ours = is_serving(container)
    for keys in (
        ("startupProbe",), ("readinessProbe",), ("livenessProbe",),
        ("lifecycle", "preStop"), ("lifecycle", "postStart"),
    ):  # fmt: skip
        for way in ("httpGet", "tcpSocket"):
            port = container.get(*keys, way, "port")
            number = port_number(port)
            if isinstance(port, str) and number is None:
                if port not in names:
                    yield container.finding(
                        PROBE, f"{container.name} has no port named {port}; it has {listed(sorted(names))}.",
                        *keys, way, "port",
                    )  # fmt: skip
            elif ours and number is not None and numbers and number not in numbers:
                yield container.finding(
                    PROBE, f"{container.name} has no port {port}; it has {listed(sorted(numbers))}.",
                    *keys, way, "port",
                )  # fmt: skip


def _service(objects: Objects, service: Thing) -> Iterator[Finding]:
    selector = service.get("spec", "selector")
    if not isinstance(selector, dict) or not selector or service.get("spec", "type") == "ExternalName":
        return
    pods = objects.behind(service)
    if not pods:
        if service.namespace == "kube-system" or service.labels.get("operated-prometheus"):
            return  # the cluster's own pods are among nobody's objects
        if objects.pods_near(service) and not any(map(objects.operated, map(str, selector.values()))):
            yield service.finding(
                SERVICE, f"No pod has {_shown(selector)}.", "spec", "selector",
                fix=_nearest_labels(objects, service, selector),
            )  # fmt: skip
        return
    for index, port in enumerate(items(service.get("spec", "ports"))):
        entry = mapping(port)
        target = entry.get("targetPort", entry.get("port"))
        key = "targetPort" if "targetPort" in entry else "port"
        keys = ("spec", "ports", index, key)
        for pod in pods:
            if entry.get("protocol", "TCP") != "TCP" and _ours(pod):
                what = f"{pod.owner.title} listens with TCP, not {entry['protocol']}."
                yield service.finding(SERVICE_PORT, what, "spec", "ports", index, "protocol")
            numbers = pod.port_numbers
            number = port_number(target)
            if isinstance(target, str) and number is None:
                if target not in pod.port_names and not is_unknown(target):
                    yield service.finding(
                        SERVICE_PORT,
                        f"{pod.owner.title} has no port named {target}; "
                        f"it has {listed(sorted(pod.port_names))}.",
                        *keys,
                    )
            elif number is not None and numbers and number not in numbers and _ours(pod):
                yield service.finding(
                    SERVICE_PORT,
                    f"{pod.owner.title} has no port {target}; it has {listed(sorted(numbers))}.",
                    *keys,
                )


def _ours(pod: Pod) -> bool:
    return any(is_serving(each) for each in pod.containers)


def _are_ours(pods: Sequence[Pod]) -> bool:
    """Whether pods are nothing but engines and gateways: a sidecar may have metrics at any path."""
    return bool(pods) and all(pod.containers and all(map(is_serving, pod.containers)) for pod in pods)


def _nearest_labels(objects: Objects, thing: Thing, selector: Mapping[str, object]) -> str:
    best = max(
        objects.pods_near(thing),
        key=lambda pod: sum(pod.labels.get(key) == value for key, value in selector.items()),
        default=None,
    )
    if best is None:
        return ""
    return f"The pods of {best.owner.title} have {_shown(best.labels)}."


def _monitor(objects: Objects, monitor: Thing) -> Iterator[Finding]:
    selector = monitor.get("spec", "selector")
    if monitor.kind == "PodMonitor":
        endpoints = "podMetricsEndpoints"
        pods = [pod for pod in objects.pods if _watches(monitor, pod.owner)]
        chosen = [pod for pod in pods if selects(selector, pod.labels)]
        if pods and not chosen:
            yield monitor.finding(MONITOR, f"No pod has {_wanted(selector)}.", "spec", "selector")
        if not chosen:
            return
        ports = {name for pod in chosen for name in pod.port_names}
    else:
        endpoints = "endpoints"
        services = [each for each in objects.of("Service") if _watches(monitor, each)]
        found = [each for each in services if selects(selector, each.labels)]
        if services and not found:
            yield monitor.finding(MONITOR, f"No Service has {_wanted(selector)}.", "spec", "selector")
            # T10 is two faults in one: the second is told before the first is put right
            found = _same_pods(objects, monitor, selector)
        if not found:
            return
        ports = {str(name) for each in found for name in _port_names(each) if name is not None}
        wanted = {str(mapping(each).get("port")) for each in items(monitor.get("spec", endpoints))}
        for service in found:
            if None in _port_names(service) and wanted & ports:
                what = f"Service {service.name} has a port without a name: it is not scraped."
                yield monitor.finding(MONITOR_PORT, what, "spec", endpoints)
    for index, endpoint in enumerate(items(monitor.get("spec", endpoints))):
        port = mapping(endpoint).get("port")
        if isinstance(port, str) and port not in ports:
            what = f"What it selects has no port named {port}; it has {listed(sorted(ports))}."
            yield monitor.finding(MONITOR_PORT, what, "spec", endpoints, index, "port")
        path = mapping(endpoint).get("path")
        scraped = (
            chosen
            if monitor.kind == "PodMonitor"
            else [each for one in found for each in objects.behind(one)]
        )
        if isinstance(path, str) and _are_ours(scraped) and path.rstrip("/") not in ("/metrics", ""):
            what = f"{scraped[0].owner.title} has no {path}."
            yield monitor.finding(MONITOR_PATH, what, "spec", endpoints, index, "path", fix="path: /metrics")
        if str(mapping(endpoint).get("scheme")).lower() == "https" and _are_ours(scraped):
            engines = [engine_of(each, objects) for pod in scraped for each in pod.containers]
            plain = [each for each in engines if each is not None and each.is_secured is False]
            if len(plain) == len(engines):
                what = f"{scraped[0].owner.title} serves HTTP."
                yield monitor.finding(MONITOR_PATH, what, "spec", endpoints, index, "scheme")


def _watches(monitor: Thing, thing: Thing) -> bool:
    """Whether a thing is in one of the namespaces that a monitor looks into."""
    namespaces = mapping(monitor.get("spec", "namespaceSelector"))
    if namespaces.get("any"):
        return True
    chosen = set(map(str, items(namespaces.get("matchNames"))))
    return (thing.namespace in chosen or not thing.namespace) if chosen else thing.near(monitor)


def _wanted(selector: object) -> str:
    return f"the labels {_shown(mapping(mapping(selector).get('matchLabels')))}"


def _port_names(service: Thing) -> list[object]:
    """Names of a Service's ports; None for one without."""
    return [mapping(port).get("name") for port in items(service.get("spec", "ports"))]


def _same_pods(objects: Objects, monitor: Thing, selector: object) -> list[Thing]:
    """Services whose pods a monitor's selector would match: those that it probably means."""
    return [
        service
        for service in objects.of("Service")
        if service.near(monitor) and any(selects(selector, pod.labels) for pod in objects.behind(service))
    ]
