"""What things are called in a cluster: labels, and names that Kubernetes takes.

models.meta/Llama-3.1-8B ─▶ meta-llama-3-1-8b: Service; Deployment of the floor; -burst: of the burst
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

NAME = "app.kubernetes.io/name"
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
PART_OF = "app.kubernetes.io/part-of"
MANAGED_BY = "app.kubernetes.io/managed-by"
VERSION = "app.kubernetes.io/version"
MODEL = "penstock.dev/model"
TIER = "penstock.dev/tier"

FREE_DEVICES = "penstock.dev/free-devices"
"""Annotation of a Deployment: devices of its pool that nobody has while a new version comes; what `penstock
check` compares a surge with."""

GATEWAY = "gateway"
"""Name of the gateway's Deployment and Service."""
WEIGHTS = "weights"
"""Name of the claim that holds weights."""
PORT, ADMIN_PORT = "http", "admin"
"""Names of ports."""
_RESERVED = frozenset({GATEWAY, WEIGHTS, "engine", "kubernetes", "penstock", "default"})
_LONGEST = 40
"""Of a slug: with -burst and what Kubernetes appends it stays below the 63 of a label."""


def slugs(models: Iterable[str]) -> Mapping[str, str]:
    """Model → its name in the cluster. Where two would have the same, they end in a hash of their own."""
    names = list(models)
    plain = {name: _plain(name) for name in names}
    taken: dict[str, int] = {}
    for slug in plain.values():
        for each in (slug, f"{slug}-burst", f"{slug}-nodes"):
            taken[each] = taken.get(each, 0) + 1
    found = {}
    for name, slug in plain.items():
        own = (slug, f"{slug}-burst", f"{slug}-nodes")
        unique = all(taken[each] == 1 for each in own) and slug not in _RESERVED
        if unique and len(slug) <= _LONGEST:
            found[name] = slug
        else:
            digest = hashlib.blake2b(name.encode(), digest_size=3).hexdigest()
            found[name] = f"{slug[: _LONGEST - 7].rstrip('-')}-{digest}"
    return found


def _plain(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug if slug[:1].isalpha() else f"m-{slug}"


def labels(component: str, instance: str, namespace: str, **more: str) -> dict[str, str]:
    """Of an object of that component. `model` and `tier` are Penstock's own."""
    own = {MODEL: more.get("model"), TIER: more.get("tier")}
    return {
        NAME: "penstock",
        INSTANCE: instance,
        COMPONENT: component,
        PART_OF: namespace,
        **{key: value for key, value in own.items() if value is not None},
    }
