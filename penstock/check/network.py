"""The way of a request through a cluster: Ingress or route, Services, NetworkPolicies, URLs in files."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cluster import Keys, Objects, Pod, Thing, integer, items, listed, mapping, port_number, selects
from .finding import Finding, Rule, Severity
from .serving import engines_of, is_serving, mounted
from .words import is_unknown

BACKEND = Rule(
    "backend-missing",
    Severity.ERROR,
    "an Ingress or a route to a Service or port that is not there",
    "Clients get 503 (404 where the controller drops the rule).",
    "Write the Service's name, and a port that it has.",
)
BUFFERING = Rule(
    "ingress-buffering",
    Severity.WARNING,
    "an Ingress that buffers answers",
    "Streams arrive in one piece at their end: the time to the first token is the time to the last.",
    'nginx.ingress.kubernetes.io/proxy-buffering: "off"',
)
TIMEOUT = Rule(
    "entry-timeout",
    Severity.WARNING,
    "an entry that ends requests before engines do",
    "Long answers without streaming, and requests that wait in the queue, end with 504; clients repeat them, "
    "and the load grows.",
    'nginx.ingress.kubernetes.io/proxy-read-timeout: "300"; HTTPRoute: timeouts.request: 300s (or 0s).',
)
POLICY = Rule(
    "policy-selects-nothing",
    Severity.WARNING,
    "a NetworkPolicy that selects no pod",
    "It protects nothing.",
    "Write podSelector as a part of the pods' labels.",
)
BLOCKED = Rule(
    "policy-blocks",
    Severity.ERROR,
    "NetworkPolicies that let no connection through where one is needed",
    "Connections time out.",
    "Admit the pods that call, on the port that they call.",
)
URL = Rule(
    "url-service",
    Severity.ERROR,
    "an address of a Service or port that is not there",
    "Connections fail: the name is not known, or nothing listens.",
    "Write http://SERVICE.NAMESPACE.svc:PORT as the Service has it.",
)
DNS = Rule(
    "policy-without-dns",
    Severity.WARNING,
    "a NetworkPolicy that lets pods call some ports, and not port 53",
    "Names are not resolved: every call by name ends with a time-out.",
    "egress: [{ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]}]",
)
EXPOSED = Rule(
    "engine-exposed",
    Severity.WARNING,
    "a Service that gives an engine to everybody outside the cluster",
    "No keys of users, limits, costs or TLS stand before it: whoever finds the address spends your GPUs.",
    "type: ClusterIP, and a gateway with keys and TLS in front.",
)
RULES = (EXPOSED, BACKEND, BUFFERING, TIMEOUT, POLICY, BLOCKED, URL, DNS)

_SHORTEST = 120
"""Seconds of an entry's time-out below which long answers are cut off."""
_NGINX = "nginx.ingress.kubernetes.io/"
_INTERNAL = re.compile(r"internal[\w-]*=(true|0\.0\.0\.0/0)|scheme=internal$|type=internal$", re.I)
"""Annotations of load balancers that are within the cloud's network only: AKS', EKS', GKE's."""
_URL = re.compile(
    r"\b(?:https?|grpc|redis|postgresql(?:\+\w+)?)://(?:[^@/\s\"']{1,200}@)?"
    r"([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)((?:\.[a-z0-9-]{1,63})*)(?::(\d{1,5}))?(?=[/\s\"',)\]]|$)"
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")


def examine(objects: Objects) -> Iterator[Finding]:
    """What is wrong on the way from clients to engines."""
    for ingress in objects.of("Ingress"):
        yield from _ingress(objects, ingress)
    for route in objects.of("HTTPRoute", "GRPCRoute", "TCPRoute"):
        yield from _route(objects, route)
    engines = {id(each.container.pod) for each in engines_of(objects)}
    for service in objects.of("Service"):
        kind = service.get("spec", "type")
        inside = any(_INTERNAL.search(f"{key}={value}") for key, value in service.annotations.items())
        serving = any(id(pod) in engines for pod in objects.behind(service))
        if kind in ("LoadBalancer", "NodePort") and serving and not inside:
            yield service.finding(EXPOSED, f"{service.title} is a {kind}.", "spec", "type")
    for policy in objects.of("NetworkPolicy"):
        selector = mapping(policy.get("spec", "podSelector"))
        if any(mapping(each).get("operator") == "NotIn" for each in items(selector.get("matchExpressions"))):
            continue  # for whatever else may come
        if selector and objects.pods_near(policy) and not objects.selected(policy, selector):
            yield policy.finding(POLICY, f"{policy.title} selects no pod.", "spec", "podSelector")
    yield from _names(objects)
    calls = list(_calls(objects))
    yield from _urls(objects, calls)
    yield from _blocked(objects, calls)


def _names(objects: Objects) -> Iterator[Finding]:
    """Policies that shut pods off from DNS, of both protocols: answers that are long come by TCP."""
    seen: set[int] = set()
    for pod in objects.pods:
        policies = _policies(objects, pod, "Egress")
        rules = [mapping(rule) for each in policies for rule in items(each.get("spec", "egress"))]
        if not rules or id(policies[0]) in seen:
            continue  # whoever may call nobody needs no names
        open_ones = [rule for rule in rules if not items(rule.get("ports"))]
        asked = [mapping(port) for rule in rules for port in items(rule.get("ports"))]
        through = {
            str(port.get("protocol", "TCP"))
            for port in asked
            if port.get("port") in (None, 53, "53", "dns", "dns-tcp")
            or ((low := integer(port.get("port"))) and low <= 53 <= (integer(port.get("endPort")) or low))
        }
        if open_ones or "UDP" in through:
            continue
        seen.add(id(policies[0]))
        what = f"{pod.owner.title} may not ask for names: no rule admits port 53 with UDP."
        yield policies[0].finding(DNS, what, "spec", "egress")


def _ports(service: Thing) -> list[Mapping[str, Any]]:
    return [mapping(each) for each in items(service.get("spec", "ports"))]


def _serves(objects: Objects, service: Thing | None) -> bool:
    """Whether a model, or what stands before one, is behind a Service."""
    if service is None:
        return False
    pods = objects.behind(service)
    engines = {id(each.container.pod) for each in engines_of(objects)}
    images = " ".join(container.image for pod in pods for container in pod.containers)
    return (
        any(id(pod) in engines for pod in pods)
        or re.search(r"penstock|litellm|router|gateway", images) is not None
    )


def _ingress(objects: Objects, ingress: Thing) -> Iterator[Finding]:
    serves = False
    backends: list[tuple[Keys, Mapping[str, Any]]] = []
    if isinstance(ingress.get("spec", "defaultBackend"), dict):
        backends.append((("spec", "defaultBackend"), ingress.get("spec", "defaultBackend")))
    for index, rule in enumerate(items(ingress.get("spec", "rules"))):
        for number, path in enumerate(items(mapping(mapping(rule).get("http")).get("paths"))):
            at = ("spec", "rules", index, "http", "paths", number, "backend")
            backends.append((at, mapping(mapping(path).get("backend"))))
    for keys, backend in backends:
        entry = mapping(backend.get("service"))
        name, port = entry.get("name"), mapping(entry.get("port"))
        if not isinstance(name, str):
            continue
        wanted = port.get("number", port.get("name"))
        kind = "number" if "number" in port else "name"
        service = objects.find("Service", name, ingress.namespace)
        yield from _backend(
            objects, ingress, name, wanted, (*keys, "service", "name"), (*keys, "service", "port", kind)
        )
        serves = serves or _serves(objects, service)
    if serves:
        yield from _annotations(ingress)


def _backend(
    objects: Objects, thing: Thing, name: str, port: Any, at: Keys, at_port: Keys
) -> Iterator[Finding]:
    service = objects.find("Service", name, thing.namespace)
    if service is None:
        names = sorted({each.name for each in objects.of("Service") if each.near(thing)})
        if names and not objects.operated(name):
            yield thing.finding(BACKEND, f"There is no Service {name}; there are {listed(names)}.", *at)
        return
    ports = _ports(service)
    known = {each[key] for each in ports for key in ("port", "name") if isinstance(each.get(key), str | int)}
    if isinstance(port, str | int) and port not in known:
        shown = ", ".join(f"{each.get('name', '')} {each.get('port')}".strip() for each in ports)
        yield thing.finding(BACKEND, f"Service {name} has no port {port}; it has {shown}.", *at_port)


def _annotations(ingress: Thing) -> Iterator[Finding]:
    said = ingress.annotations
    of_class = str(ingress.get("spec", "ingressClassName") or said.get("kubernetes.io/ingress.class") or "")
    at = ("metadata", "annotations")
    if str(said.get(f"{_NGINX}proxy-buffering", "off")) == "on":
        yield ingress.finding(BUFFERING, "proxy-buffering is on.", *at, f"{_NGINX}proxy-buffering")
    if "nginx" not in of_class and not any(str(key).startswith(_NGINX) for key in said):
        return
    for name in ("proxy-read-timeout", "proxy-send-timeout"):
        value = said.get(f"{_NGINX}{name}")
        text = str(value).strip() if value is not None else "60"
        if name == "proxy-send-timeout" and value is None:
            continue
        if not text.isdigit() and not is_unknown(text):
            what = f"{name} is {value}, which is no number: the controller takes its own, 60 s."
            digits = re.match(r"\d+", text)
            fix = f'{name}: "{digits[0]}"' if digits and text.endswith("s") else ""
            yield ingress.finding(TIMEOUT, what, *at, f"{_NGINX}{name}", fix=fix)
        elif text.isdigit() and int(text) < _SHORTEST:
            default = " (the default)" if value is None else ""
            yield ingress.finding(TIMEOUT, f"{name} is {text} s{default}.", *at, f"{_NGINX}{name}")


def _route(objects: Objects, route: Thing) -> Iterator[Finding]:
    for index, rule in enumerate(items(route.get("spec", "rules"))):
        for number, each in enumerate(items(mapping(rule).get("backendRefs"))):
            entry = mapping(each)
            if entry.get("kind", "Service") != "Service" or entry.get("namespace", "") not in (
                "",
                route.namespace,
            ):
                continue
            keys = ("spec", "rules", index, "backendRefs", number)
            name = str(entry.get("name"))
            yield from _backend(objects, route, name, entry.get("port"), (*keys, "name"), (*keys, "port"))
            if not _serves(objects, objects.find("Service", name, route.namespace)):
                continue
            for which in ("request", "backendRequest"):
                value = mapping(mapping(rule).get("timeouts")).get(which)
                seconds = _seconds(value)
                if seconds is not None and 0 < seconds < _SHORTEST:
                    at = ("spec", "rules", index, "timeouts", which)
                    yield route.finding(TIMEOUT, f"timeouts.{which} is {value}.", *at)


def _seconds(value: Any) -> float | None:
    if not isinstance(value, str) or not value:
        return None
    scale = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    return sum(float(amount) * scale[unit] for amount, unit in _DURATION.findall(value))


_Call = tuple[Pod, str, str, "int | None", str, int, int]


def _calls(objects: Objects) -> Iterator[_Call]:
    """(pod, host, rest of the name, port, path, line, column) of URLs in pods' variables, args and files."""
    for pod in objects.pods:
        document = pod.owner.document
        for container in pod.all_containers:
            for field in ("command", "args"):
                for index, word in enumerate(items(container.data.get(field))):
                    if isinstance(word, str):
                        for match in _URL.finditer(word):
                            place = document.value_at(*container.keys, field, index, offset=match.start())
                            yield (pod, *_parts(match), document.path, *place)
            for index, each in enumerate(items(container.data.get("env"))):
                value = mapping(each).get("value")
                if isinstance(value, str):
                    for match in _URL.finditer(value):
                        place = document.value_at(
                            *container.keys, "env", index, "value", offset=match.start()
                        )
                        yield (pod, *_parts(match), document.path, *place)
            names = {
                str(mapping(volume.get("configMap")).get("name"))
                for _, volume in pod.volumes.values()
                if "configMap" in volume
            }
            files = {text for _, text in mounted(pod, container, objects)}
            for name in sorted(names):
                config = objects.find("ConfigMap", name, pod.owner.namespace)
                for key, text in mapping(config.get("data")).items() if config is not None else ():
                    if config is None or not isinstance(text, str) or text not in files:
                        continue
                    for match in _URL.finditer(text):
                        place = config.document.value_at("data", key, offset=match.start())
                        yield (pod, *_parts(match), config.document.path, *place)


def _parts(match: re.Match[str]) -> tuple[str, str, int | None]:
    return match[1], match[2], int(match[3]) if match[3] else None


def _service_of(objects: Objects, pod: Pod, host: str, rest: str) -> tuple[Thing | None, bool]:
    """The Service that a name means, and whether the name means one of the objects' namespaces at all."""
    parts = rest.strip(".").split(".") if rest else []
    if len(parts) >= 2 and parts[1] != "svc":
        return None, False
    namespace = parts[0] if parts else pod.owner.namespace
    if parts and not any(each.namespace == namespace for each in objects.of("Service")):
        return None, False
    if not parts and (host == "localhost" or not any(True for _ in objects.of("Service"))):
        return None, False
    if len(parts) == 1 and not re.fullmatch(r"[a-z0-9-]+", parts[0]):
        return None, False
    return objects.find("Service", host, namespace), True


def _urls(objects: Objects, calls: Sequence[_Call]) -> Iterator[Finding]:
    for pod, host, rest, port, path, line, column in calls:
        service, ours = _service_of(objects, pod, host, rest)
        if service is None:
            called = rest.count(".") >= 2 or (not rest and port is not None)
            if ours and called and not objects.operated(host):
                names = listed(sorted({each.name for each in objects.of("Service")}))
                yield Finding(URL, path, line, column, f"There is no Service {host}; there are {names}.")
            continue
        numbers = _open_ports(objects, service)
        wanted = port or 80
        if numbers and wanted not in numbers:
            shown = ", ".join(map(str, sorted(numbers)))
            yield Finding(URL, path, line, column, f"Service {host} has no port {wanted}; it has {shown}.")


def _open_ports(objects: Objects, service: Thing) -> set[int]:
    """Ports by which a Service is reached; empty if they are not known. Behind a headless one, they are the
    pods' own, and only those of programs that declare all."""
    if service.get("spec", "clusterIP") != "None":
        return {number for each in _ports(service) if (number := integer(each.get("port"))) is not None}
    pods = objects.behind(service)
    if not all(is_serving(container) for pod in pods for container in pod.containers):
        return set()
    return {number for pod in pods for number in pod.port_numbers}


def _blocked(objects: Objects, calls: Sequence[_Call]) -> Iterator[Finding]:
    """Calls, scrapes and entries that no NetworkPolicy of their pods lets through."""
    seen: set[tuple[int, int, int | None]] = set()
    outside: set[tuple[int, str, int]] = set()
    for pod, host, rest, port, *_ in calls:
        service, ours = _service_of(objects, pod, host, rest)
        if service is None:
            whom = f"{host}{rest}"
            local = whom == "localhost" or whom.startswith("127.")
            if port is not None and not ours and not local and (id(pod), whom, port) not in outside:
                outside.add((id(pod), whom, port))
                yield from _shut_in(objects, pod, whom, port)
            continue
        for target in objects.behind(service):
            number = _target_port(service, port or 80, target)
            if (id(pod), id(target), number) in seen:
                continue
            seen.add((id(pod), id(target), number))
            for direction, policies, other in (
                ("ingress", _policies(objects, target, "Ingress"), pod),
                ("egress", _policies(objects, pod, "Egress"), target),
            ):
                if policies and not any(_admits(each, direction, other, number, target) for each in policies):
                    yield policies[0].finding(
                        BLOCKED, f"{pod.owner.title} does not reach {target.owner.title} on port {number}.",
                        "spec", direction,
                    )  # fmt: skip
    for monitor in objects.of("ServiceMonitor"):
        yield from _scraped(objects, monitor)


def _shut_in(objects: Objects, pod: Pod, host: str, port: int) -> Iterator[Finding]:
    """A pod whose policies let it call only others than somebody who is not among the objects: a collector of
    spans, a database, a cloud. Whether a rule for other namespaces or addresses means that one is unknown."""
    policies = _policies(objects, pod, "Egress")
    if policies and not any(_admits(each, "egress", None, port, None) for each in policies):
        yield policies[0].finding(
            BLOCKED, f"{pod.owner.title} does not reach {host} on port {port}: no rule lets it out there.",
            "spec", "egress",
        )  # fmt: skip


def _scraped(objects: Objects, monitor: Thing) -> Iterator[Finding]:
    for service in objects.of("Service"):
        if not service.near(monitor) or not selects(monitor.get("spec", "selector"), service.labels):
            continue
        for endpoint in items(monitor.get("spec", "endpoints")):
            name = mapping(endpoint).get("port")
            numbers = [each.get("port") for each in _ports(service) if each.get("name") == name]
            for target in objects.behind(service) if numbers else ():
                number = _target_port(service, integer(numbers[0]) or 0, target)
                policies = _policies(objects, target, "Ingress")
                if policies and not any(_admits(each, "ingress", None, number, target) for each in policies):
                    yield policies[0].finding(
                        BLOCKED, f"Prometheus, in another namespace, does not reach {target.owner.title} on "
                        f"port {number}, which {monitor.title} scrapes.", "spec", "ingress",
                    )  # fmt: skip


def _target_port(service: Thing, port: int, pod: Pod) -> int | None:
    if service.get("spec", "clusterIP") == "None":
        return port
    for each in _ports(service):
        if each.get("port") == port:
            target = each.get("targetPort", port)
            if isinstance(target, str) and port_number(target) is None:
                for container in pod.containers:
                    for entry in container.ports:
                        if entry.get("name") == target:
                            return integer(entry.get("containerPort"))
                return None
            return port_number(target)
    return None


def _policies(objects: Objects, pod: Pod, kind: str) -> list[Thing]:
    """The NetworkPolicies that isolate a pod in one direction."""
    found = []
    for policy in objects.of("NetworkPolicy"):
        if not policy.near(pod.owner) or not selects(
            mapping(policy.get("spec", "podSelector")) or {}, pod.labels
        ):
            continue
        said = items(policy.get("spec", "policyTypes"))
        types = (
            set(map(str, said))
            if said
            else {"Ingress"} | ({"Egress"} if policy.get("spec", "egress") else set())
        )
        if kind in types:
            found.append(policy)
    return found


def _admits(policy: Thing, direction: str, other: Pod | None, port: int | None, target: Pod | None) -> bool:
    """Whether a policy lets a pod's connection through; `other` None is a pod of another namespace, and a
    `target` of None one whose ports nobody knows."""
    peers = "from" if direction == "ingress" else "to"
    for rule in items(policy.get("spec", direction)):
        entry = mapping(rule)
        if items(entry.get("ports")) and not any(
            _is_port(each, port, target) for each in items(entry["ports"])
        ):
            continue
        if not items(entry.get(peers)):
            return True
        if any(_is_peer(mapping(each), other, policy) for each in items(entry[peers])):
            return True
    return False


def _is_port(entry: Any, port: int | None, target: Pod | None) -> bool:
    said = mapping(entry).get("port")
    if mapping(entry).get("protocol", "TCP") != "TCP":
        return False
    if said is None or port is None:
        return True
    number = port_number(said)
    if number is None:
        return target is None or any(
            each.get("name") == said and each.get("containerPort") == port
            for container in target.containers
            for each in container.ports
        )
    return number <= port <= (integer(mapping(entry).get("endPort")) or number)


def _is_peer(peer: Mapping[str, Any], other: Pod | None, policy: Thing) -> bool:
    if "ipBlock" in peer:
        try:
            network = ipaddress.ip_network(str(mapping(peer["ipBlock"]).get("cidr")), strict=False)
        except ValueError:
            return False
        return other is None or network.prefixlen == 0
    names = peer.get("namespaceSelector")
    if other is None:
        return names is not None
    if names is None:
        inside = other.owner.near(policy)
    else:
        labels = {"kubernetes.io/metadata.name": other.owner.namespace or None}
        inside = selects(names, labels) or bool(names and "kubernetes.io/metadata.name" not in str(names))
    return inside and ("podSelector" not in peer or selects(peer["podSelector"] or {}, other.labels))
