"""Entries from outside the cluster: their certificates, and the paths that they admit.

    Certificate ──▶ Secret ──▶ spec.tls of an Ingress, a listener of a Gateway
    host, path  ──▶ Service

What ends TLS elsewhere (a load balancer with a certificate of its own) says so in annotations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .admission import REFUSED
from .cluster import Objects, Thing, items, listed, mapping
from .finding import Finding, Rule, Severity
from .serving import is_serving
from .words import is_unknown

TLS = Rule(
    "entry-tls",
    Severity.WARNING,
    "an Ingress whose TLS is not for the hosts that it serves",
    "Clients get the controller's own certificate, and refuse it; or keys and prompts go in plain text.",
    "Write the same host under spec.tls[].hosts and spec.rules[].host.",
)
PLAIN = Rule(
    "tls-missing",
    Severity.WARNING,
    "an Ingress without TLS, for whose host a certificate is asked for",
    "Keys and prompts go in plain text: without spec.tls, cert-manager's annotation does nothing, and nobody "
    "serves the Certificate.",
    "spec.tls: [{hosts: [HOST], secretName: NAME}]",
)
CERTIFICATE = Rule(
    "certificate-unused",
    Severity.WARNING,
    "a Certificate whose Secret nobody uses, beside an entry of its host that names another",
    "The entry has no certificate, and clients refuse the controller's own; or one that nobody renews.",
    "Write the same secretName in both.",
)
PATH = Rule(
    "entry-path",
    Severity.ERROR,
    "an Ingress that admits a folder of the API, and nothing in it",
    "pathType: Exact is that path alone: /v1/chat/completions and all others answer 404.",
    "pathType: Prefix",
)
RULES = (TLS, PLAIN, CERTIFICATE, PATH)

_ISSUERS = ("cert-manager.io/cluster-issuer", "cert-manager.io/issuer", "kubernetes.io/tls-acme")
_ELSEWHERE = re.compile(r"certificate|pre-shared-cert|ssl|tls(?!-acme)|redirect|https", re.IGNORECASE)
"""In an annotation: TLS is ended by other means, or this Ingress only leads to HTTPS."""
_FOLDERS = frozenset(("/", "/v1"))


def examine(objects: Objects) -> Iterator[Finding]:
    """What is wrong with Ingresses and certificates."""
    ingresses = [each for each in objects.of("Ingress") if each.group == "networking.k8s.io"]
    certificates = [each for each in objects.of("Certificate") if each.group == "cert-manager.io"]
    for ingress in ingresses:
        yield from _tls(ingress)
        yield from _plain(ingress, ingresses, certificates)
        yield from _paths(ingress, objects)
    for certificate in certificates:
        yield from _certificate(certificate, objects)


def _tls(ingress: Thing) -> Iterator[Finding]:
    covered = _secured(ingress)
    if not covered:
        return
    for index, host in _hosts(ingress):
        if not _covers(covered, host):
            what = f"{host} is served; TLS is for {', '.join(sorted(covered))}."
            yield ingress.finding(TLS, what, "spec", "rules", index, "host")


def _secured(ingress: Thing) -> set[str]:
    """Hosts of an Ingress's spec.tls."""
    return {
        str(host) for each in items(ingress.get("spec", "tls")) for host in items(mapping(each).get("hosts"))
    }


def _hosts(ingress: Thing) -> Iterator[tuple[int, str]]:
    """(index of the rule, host) of what an Ingress serves."""
    for index, rule in enumerate(items(ingress.get("spec", "rules"))):
        host = mapping(rule).get("host")
        if isinstance(host, str) and not is_unknown(host):
            yield index, host


def _covers(hosts: set[str], host: str) -> bool:
    return host in hosts or f"*.{host.partition('.')[2]}" in hosts


def _names(certificate: Thing) -> set[str]:
    common = certificate.get("spec", "commonName")
    names = {str(each) for each in items(certificate.get("spec", "dnsNames"))}
    return names | ({common} if isinstance(common, str) else set())


def _plain(ingress: Thing, all: list[Thing], certificates: list[Thing]) -> Iterator[Finding]:
    hosts = [host for _, host in _hosts(ingress)]
    others = [each for each in ingress.annotations if str(each) not in _ISSUERS]
    if ingress.get("spec", "tls") or not hosts or any(_ELSEWHERE.search(str(each)) for each in others):
        return
    # beside one with TLS, it may be the one that answers challenges, or leads to the other
    if any(each.get("spec", "tls") and {host for _, host in _hosts(each)} & set(hosts) for each in all):
        return
    for key in _ISSUERS:
        if ingress.annotations.get(key) not in (None, "", "false"):
            what = f"{key} asks for a certificate of {listed(hosts)}, and spec.tls names no Secret for it."
            yield ingress.finding(PLAIN, what, "metadata", "annotations", key)
            return
    for certificate in certificates:
        covered = [host for host in hosts if _covers(_names(certificate), host)]
        if covered and certificate.near(ingress):
            what = f"{covered[0]} is served without TLS; {certificate.title} is for it."
            fix = (
                f"spec.tls: [{{hosts: [{covered[0]}], secretName: {certificate.get('spec', 'secretName')}}}]"
            )
            yield ingress.finding(PLAIN, what, "spec", fix=fix)
            return


def _certificate(certificate: Thing, objects: Objects) -> Iterator[Finding]:
    name, hosts = certificate.get("spec", "secretName"), _names(certificate)
    if not isinstance(name, str) or is_unknown(name) or _is_called(name, certificate, objects):
        return
    for thing, where, secret in _served(objects, hosts):
        made = any(each.get("spec", "secretName") == secret for each in objects.of("Certificate"))
        if thing.near(certificate) and not made and objects.find("Secret", secret, thing.namespace) is None:
            what = f"The Secret of {certificate.title} is {name}; {thing.title} serves {where} with {secret}."
            yield certificate.finding(CERTIFICATE, what, "spec", "secretName", fix=f"secretName: {secret}")
            return


def _served(objects: Objects, hosts: set[str]) -> Iterator[tuple[Thing, str, str]]:
    """(object, host, name of the Secret) of what serves hosts with a Secret that nobody makes for it."""
    for ingress in objects.of("Ingress"):
        if any(key in ingress.annotations for key in _ISSUERS):
            continue  # cert-manager fills the Secret that it names
        for each in items(ingress.get("spec", "tls")):
            secret = mapping(each).get("secretName")
            for host in map(str, items(mapping(each).get("hosts"))):
                if isinstance(secret, str) and _covers(hosts, host):
                    yield ingress, host, secret
    for gateway in objects.of("Gateway"):
        if any(key in gateway.annotations for key in _ISSUERS):
            continue
        for listener in items(gateway.get("spec", "listeners")):
            name = mapping(listener).get("hostname")
            for each in items(mapping(mapping(listener).get("tls")).get("certificateRefs")):
                secret = mapping(each).get("name")
                here = mapping(each).get("namespace", gateway.namespace) == gateway.namespace
                if here and isinstance(secret, str) and isinstance(name, str) and _covers(hosts, name):
                    yield gateway, name, secret


def _is_called(name: str, certificate: Thing, objects: Objects) -> bool:
    """Whether a Secret's name stands anywhere else than in the Certificate that makes it."""
    others = (each.document.data for each in objects.things if each is not certificate)
    return any(_has(data, name) for data in others)


def _has(data: object, name: str) -> bool:
    """Whether a name stands somewhere, alone or behind its namespace; names and labels of objects
    are none."""
    if isinstance(data, dict):
        parts = (
            mapping(each).get("annotations") if key == "metadata" else each
            for key, each in data.items()
            if key not in ("labels", "matchLabels")
        )
        return any(_has(each, name) for each in parts)
    if isinstance(data, list):
        return any(_has(each, name) for each in data)
    return isinstance(data, str) and re.split("[/=]", data)[-1] == name


def _paths(ingress: Thing, objects: Objects) -> Iterator[Finding]:
    for number, rule in enumerate(items(ingress.get("spec", "rules"))):
        entries = [mapping(each) for each in items(mapping(mapping(rule).get("http")).get("paths"))]
        prefixes = [each for each in entries if each.get("pathType") != "Exact"]
        for index, entry in enumerate(entries):
            at = ("spec", "rules", number, "http", "paths", index)
            path = entry.get("path")
            if not isinstance(path, str) or not path or is_unknown(path):
                continue
            if not path.startswith("/"):
                what = f"path: {path} does not begin with a slash."
                yield ingress.finding(REFUSED, what, *at, "path", fix=f"path: /{path}")
            elif entry.get("pathType") == "Exact" and (path.rstrip("/") or "/") in _FOLDERS and not prefixes:
                name = mapping(mapping(entry.get("backend")).get("service")).get("name")
                service = objects.find("Service", str(name), ingress.namespace)
                pods = objects.behind(service) if service is not None else []
                if pods and all(any(map(is_serving, pod.containers)) for pod in pods):
                    yield ingress.finding(PATH, f"Exact {path} is no path of the API.", *at, "pathType")
