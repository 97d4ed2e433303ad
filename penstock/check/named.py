"""What pods call by its name: ConfigMaps, Secrets, claims, accounts, priorities; and their entries.

What is not among the objects may be in the cluster. Secrets, claims and priorities are often made by hand:
each is one note, with the entries that it needs, unless another has nearly the same name. Others are a
warning where there are some of their kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from penstock.core.near import nearest

from .cluster import Container, Keys, Objects, Thing, items, listed, mapping
from .finding import Finding, Rule, Severity
from .scalers import most
from .words import is_unknown

MISSING = Rule(
    "reference-missing",
    Severity.WARNING,
    "a name of something that is not among the objects",
    "Unless it is in the cluster already, pods wait in CreateContainerConfigError or Pending for ever.",
    "Correct the name, or add the object.",
)
EXTERNAL = Rule(
    "object-external",
    Severity.NOTE,
    "an object that must be there before these are applied",
    "Pods wait for it, in CreateContainerConfigError or Pending; without their PriorityClass, none is made.",
    "Make it beforehand; a Secret: kubectl create secret generic NAME --from-literal=KEY=…",
)
KEY = Rule(
    "key-missing",
    Severity.ERROR,
    "an entry that a ConfigMap or Secret does not have",
    "Pods wait in CreateContainerConfigError, or with a file missing.",
    "Name an entry that is there.",
)
CLAIM = Rule(
    "volume-access",
    Severity.WARNING,
    "a claim that one node at a time may mount, and pods that may be on several",
    "All pods but those of one node wait in ContainerCreating (Multi-Attach error).",
    "Use accessModes: [ReadWriteMany] (or ReadOnlyMany), or a claim for each pod.",
)
RULES = (MISSING, EXTERNAL, KEY, CLAIM)


def examine(objects: Objects) -> Iterator[Finding]:
    """Names and entries that are not there, and claims that too many mount."""
    yield from _names(objects)
    yield from _claims(objects)


def _names(objects: Objects) -> Iterator[Finding]:
    external: dict[tuple[str, str, str], tuple[Thing, Keys, set[str]]] = {}
    for thing, keys, kind, name, entry, optional in _references(objects):
        found = objects.find(kind, name, thing.namespace)
        if optional:
            continue
        if found is None and kind == "Secret" and _is_certificate(objects, thing, name):
            continue
        if found is None:
            if (kind == "ServiceAccount" and name == "default") or is_unknown(name):
                continue
            there = [each.name for each in objects.of(kind) if each.near(thing)]
            near = nearest(name, there, 0.92)
            if near or (there and kind not in ("Secret", "PersistentVolumeClaim", "PriorityClass")):
                fix = f"name: {near}" if near else ""
                yield thing.finding(MISSING, f"There is no {kind} {name} among the objects.", *keys, fix=fix)
                continue
            first = external.setdefault((kind, thing.namespace, name), (thing, keys, set()))
            if entry:
                first[2].add(entry)
        elif entry:
            there_keys = {
                key for field in ("data", "stringData", "binaryData") for key in mapping(found.get(field))
            }
            if entry not in there_keys and there_keys:
                yield thing.finding(
                    KEY, f"{kind} {name} has no entry {entry}; it has {listed(sorted(there_keys))}.", *keys
                )
    for (kind, _, name), (thing, keys, entries) in external.items():
        wanted = f" with {', '.join(sorted(entries))}" if entries else ""
        yield thing.finding(EXTERNAL, f"{kind} {name}{wanted} is not among the objects.", *keys)


def _is_certificate(objects: Objects, thing: Thing, name: str) -> bool:
    """Whether cert-manager makes a Secret."""
    certificates = objects.of("Certificate")
    return any(each.get("spec", "secretName") == name and each.near(thing) for each in certificates)


_Reference = tuple[Thing, Keys, str, str, "str | None", bool]


def _references(objects: Objects) -> Iterator[_Reference]:
    """(object, path, kind, name, entry, whether it may be absent) of what is called by its name."""
    for pod in objects.pods:
        owner, top = pod.owner, (*pod.keys, "spec")
        account = pod.spec.get("serviceAccountName")
        if isinstance(account, str) and account:
            yield owner, (*top, "serviceAccountName"), "ServiceAccount", account, None, False
        urgency = pod.spec.get("priorityClassName")
        if isinstance(urgency, str) and urgency and not urgency.startswith("system-"):
            yield owner, (*top, "priorityClassName"), "PriorityClass", urgency, None, False
        for index, each in enumerate(items(pod.spec.get("imagePullSecrets"))):
            yield (
                owner,
                (*top, "imagePullSecrets", index),
                "Secret",
                str(mapping(each).get("name")),
                None,
                False,
            )
        for index, volume in pod.volumes.values():
            if index >= 0:
                yield from _of_volume(owner, (*top, "volumes", index), volume)
        for container in pod.all_containers:
            yield from _of_environment(owner, container)
    for ingress in objects.of("Ingress"):
        if any(str(key).startswith("cert-manager.io/") for key in ingress.annotations):
            continue
        for index, each in enumerate(items(ingress.get("spec", "tls"))):
            name = mapping(each).get("secretName")
            if isinstance(name, str):
                yield ingress, ("spec", "tls", index, "secretName"), "Secret", name, None, False
    for binding in objects.of("RoleBinding"):
        role = mapping(binding.get("roleRef"))
        if role.get("kind") == "Role":
            yield binding, ("roleRef", "name"), "Role", str(role.get("name")), None, False
        for index, subject in enumerate(items(binding.get("subjects"))):
            entry = mapping(subject)
            here = entry.get("namespace", binding.namespace) in (binding.namespace, "")
            if entry.get("kind") == "ServiceAccount" and here:
                yield (
                    binding,
                    ("subjects", index, "name"),
                    "ServiceAccount",
                    str(entry.get("name")),
                    None,
                    False,
                )


def _of_volume(owner: Thing, keys: Keys, volume: Mapping[str, object]) -> Iterator[_Reference]:
    claim = mapping(volume.get("persistentVolumeClaim")).get("claimName")
    if isinstance(claim, str):
        yield (
            owner,
            (*keys, "persistentVolumeClaim", "claimName"),
            "PersistentVolumeClaim",
            claim,
            None,
            False,
        )
    sources: list[tuple[Keys, Mapping[str, object]]] = [(keys, volume)]
    for index, each in enumerate(items(mapping(volume.get("projected")).get("sources"))):
        sources.append(((*keys, "projected", "sources", index), mapping(each)))
    for place, source in sources:
        for kind, field, named in (
            ("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName"),
            ("Secret", "secret", "name"),
        ):  # fmt: skip
            part = mapping(source.get(field))
            name = part.get(named)
            if not isinstance(name, str):
                continue
            optional = part.get("optional") is True
            yield owner, (*place, field, named), kind, name, None, optional
            for index, item in enumerate(items(part.get("items"))):
                entry = mapping(item).get("key")
                if isinstance(entry, str):
                    yield owner, (*place, field, "items", index, "key"), kind, name, entry, optional


def _of_environment(owner: Thing, container: Container) -> Iterator[_Reference]:
    for index, each in enumerate(items(container.data.get("envFrom"))):
        for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            part = mapping(mapping(each).get(field))
            if isinstance(part.get("name"), str):
                keys = (*container.keys, "envFrom", index, field, "name")
                yield owner, keys, kind, str(part["name"]), None, part.get("optional") is True
    for index, each in enumerate(items(container.data.get("env"))):
        for kind, field in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
            part = mapping(mapping(mapping(each).get("valueFrom")).get(field))
            if isinstance(part.get("name"), str):
                keys = (*container.keys, "env", index, "valueFrom", field, "key")
                yield owner, keys, kind, str(part["name"]), str(part.get("key")), part.get("optional") is True


def _claims(objects: Objects) -> Iterator[Finding]:
    for claim in objects.of("PersistentVolumeClaim"):
        modes = set(map(str, items(claim.get("spec", "accessModes"))))
        if not modes or modes & {"ReadWriteMany", "ReadOnlyMany"}:
            continue
        users = [
            pod
            for pod in objects.pods_near(claim)
            if pod.owner.kind not in ("Job", "CronJob")
            and any(
                mapping(volume.get("persistentVolumeClaim")).get("claimName") == claim.name
                for _, volume in pod.volumes.values()
            )
        ]
        pods = sum(most(objects, pod) for pod in users)
        if pods > 1:
            names = ", ".join(pod.owner.title for pod in users)
            yield claim.finding(
                CLAIM, f"{claim.name} is {'/'.join(sorted(modes))}; {pods} pods of {names} mount it.",
                "spec", "accessModes",
            )  # fmt: skip
