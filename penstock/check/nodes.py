"""Labels of nodes by which pods choose them: a name that no node has leaves a pod in Pending for ever.

    nodeSelector, nodeAffinity   nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB[-MIG-PROFILE][-SHARED]
    topologyKey                  topology.kubernetes.io/zone

Nobody here knows the nodes. A slip is told where a label is nearly one that there is, and cannot be another;
a product that is in no table is a note.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from penstock.core.near import nearest

from .cluster import Keys, Objects, Pod, items, listed, mapping
from .finding import Finding, Rule, Severity
from .words import is_unknown

PRODUCT = Rule(
    "gpu-product",
    Severity.WARNING,
    "a GPU by a name that its driver does not write",
    "No node has such a label: the pod waits in Pending for ever; where there are several values, nodes of "
    "this one are never used.",
    "Write the value as `kubectl get nodes -L nvidia.com/gpu.product` shows it.",
)
UNLISTED = Rule(
    "gpu-product-unlisted",
    Severity.NOTE,
    "a GPU that is in no table",
    "Whether a node has such a label was not checked; if none has, the pod waits in Pending for ever.",
    "Compare it with `kubectl get nodes -L nvidia.com/gpu.product`.",
)
LABEL = Rule(
    "node-label",
    Severity.WARNING,
    "a label or a taint of nodes with a slip in its name",
    "No node has it: a pod that must have it, or tolerates it in place of another, waits in Pending for "
    "ever; a spread over it has no effect.",
    "Write the label as `kubectl get nodes --show-labels` shows it.",
)
RULES = (PRODUCT, UNLISTED, LABEL)

_KEY = "nvidia.com/gpu.product"
_SUFFIX = re.compile(r"(-MIG-(\d+c\.)?\d+g\.\d+gb(\.[a-z.]+)?)?(-SHARED)?$")
"""What the feature discovery adds: the slice of the strategy `single`, and sharing by time-slicing or MPS."""
_VIRTUAL = re.compile(r"^(GRID|NVIDIA-GRID)-|-\d+(-\d+)?[ABCQ](ME)?$|-MIG-INVALID$")
"""Names of vGPUs, one for each size and licence; and what is said where slices are of several sizes."""
_MODEL = re.compile(r"[A-Z]{1,2}\d{1,4}[A-Z]?|\d{4}", re.IGNORECASE)
"""A part of a product's name that another product may have otherwise: A100, L40S, GB200, 4090."""
_WHOLE = frozenset("P100 V100 A100 H100 GH200".split())
"""Models whose driver's name always says more: the form, the memory."""
_NVIDIA = (
    "cuda.driver-version.full cuda.driver-version.major cuda.driver-version.minor "
    "cuda.driver-version.revision cuda.driver.major cuda.driver.minor cuda.driver.rev "
    "cuda.runtime-version.full cuda.runtime-version.major cuda.runtime-version.minor cuda.runtime.major "
    "cuda.runtime.minor gfd.timestamp gpu.clique gpu.compute.major gpu.compute.minor gpu.count gpu.family "
    "gpu.imex-domain gpu.machine gpu.memory gpu.mode gpu.present gpu.product gpu.replicas "
    "gpu.sharing-strategy gpu.workload.config mig.capable mig.config mig.config.state mig.strategy "
    "mps.capable vgpu.present vgpu.host-driver-version vgpu.host-driver-branch vgpu.config "
    "vgpu.config.state"
)
_LABELS = {
    "kubernetes.io": "arch hostname os",
    "topology.kubernetes.io": "region zone",
    "node.kubernetes.io": "instance-type windows-build",
    "nvidia.com": _NVIDIA,
}
"""Domain → the labels that Kubernetes, the cloud's controller or NVIDIA's operator writes."""
_TAINT = "nvidia.com/gpu"
"""Of nodes with GPUs: GKE's, and what NVIDIA's operator tolerates."""
_NEAR = 0.85
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def examine(objects: Objects) -> Iterator[Finding]:
    """Labels that no node has."""
    for pod in objects.pods:
        for key, values, keys in chosen(pod):
            if (meant := _slip(key)) is not None:
                yield pod.finding(LABEL, f"No node has {key}.", *keys, fix=f"Write {meant}.")
            for value in values if key == _KEY else ():
                yield from _product(pod, value, keys)
        yield from _tolerated(pod)


def chosen(pod: Pod) -> Iterator[tuple[str, Sequence[str], Keys]]:
    """(label, the values that are asked for, its path) of all by which a pod chooses nodes."""
    for key, value in mapping(pod.spec.get("nodeSelector")).items():
        yield str(key), (str(value),), ("spec", "nodeSelector", key)
    for keys, term in _terms(pod):
        for index, each in enumerate(items(term.get("matchExpressions"))):
            entry = mapping(each)
            named = items(entry.get("values")) if entry.get("operator") == "In" else ()
            values = [str(value) for value in named]
            yield str(entry.get("key")), values, (*keys, "matchExpressions", index)
    for index, each in enumerate(items(pod.spec.get("topologySpreadConstraints"))):
        at = ("spec", "topologySpreadConstraints", index, "topologyKey")
        yield str(mapping(each).get("topologyKey")), (), at
    for kind in ("podAffinity", "podAntiAffinity"):
        rules = mapping(mapping(pod.spec.get("affinity")).get(kind))
        for name, inner in ((_REQUIRED, ()), (_PREFERRED, ("podAffinityTerm",))):
            for index, each in enumerate(items(rules.get(name))):
                term = mapping(mapping(each).get(inner[0])) if inner else mapping(each)
                at = ("spec", "affinity", kind, name, index, *inner, "topologyKey")
                yield str(term.get("topologyKey")), (), at


def _terms(pod: Pod) -> Iterator[tuple[Keys, Mapping[str, Any]]]:
    """(path, term) of a pod's nodeAffinity."""
    affinity = mapping(mapping(pod.spec.get("affinity")).get("nodeAffinity"))
    at = ("spec", "affinity", "nodeAffinity")
    for index, each in enumerate(items(mapping(affinity.get(_REQUIRED)).get("nodeSelectorTerms"))):
        yield (*at, _REQUIRED, "nodeSelectorTerms", index), mapping(each)
    for index, each in enumerate(items(affinity.get(_PREFERRED))):
        yield (*at, _PREFERRED, index, "preference"), mapping(mapping(each).get("preference"))


def _slip(key: str) -> str | None:
    """The label that somebody meant; None where it is one, or may be one of somebody's own."""
    domain, _, name = key.rpartition("/")
    if name.startswith("gpu.deploy."):  # one for each part of the operator
        return None
    if domain in _LABELS:
        known = _LABELS[domain].split()
        near = None if name in known else nearest(name, known, _NEAR)
        # a word or a number more is a label of its own
        same = near is not None and len(re.split(r"[.-]", near)) == len(re.split(r"[.-]", name))
        return f"{domain}/{near}" if same and _digits(name) == _digits(str(near)) else None
    near = nearest(domain, _LABELS, 0.94) if domain else None
    return f"{near}/{name}" if near is not None and name in _LABELS[near].split() else None


def _tolerated(pod: Pod) -> Iterator[Finding]:
    """A toleration whose key is nearly that of nodes with GPUs, beside none for it."""
    keys = [mapping(each).get("key") for each in items(pod.spec.get("tolerations"))]
    if None in keys or _TAINT in keys:
        return
    for index, key in enumerate(keys):
        near = difflib.SequenceMatcher(None, str(key), _TAINT).ratio() >= 0.92
        if near and _digits(str(key)) == [] and any(each.devices() for each in pod.containers):
            what = f"No node is tainted with {key}."
            yield pod.finding(LABEL, what, "spec", "tolerations", index, "key", fix=f"key: {_TAINT}")


def _digits(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _product(pod: Pod, value: str, keys: Keys) -> Iterator[Finding]:
    name = _SUFFIX.sub("", value)
    if name in products() or is_unknown(value) or not value or _VIRTUAL.search(value):
        return
    suffix = value.removeprefix(name)
    meant = [f"{each}{suffix}" for each in _meant(name)]
    if meant:
        what = f"No driver calls a GPU {value}; there is {listed(meant)}."
        yield pod.finding(PRODUCT, what, *keys, fix=f"{_KEY}: {meant[0]}" if len(meant) == 1 else "")
    else:
        near = nearest(name, products())
        hint = f" The nearest that is known is {near}{suffix}." if near else ""
        yield pod.finding(UNLISTED, f"{value} is not among the products that are known.{hint}", *keys)


@cache
def products() -> frozenset[str]:
    """The values of nvidia.com/gpu.product that are known, without what slices and sharing add."""
    text = (
        resources.files("penstock.check").joinpath("tables", "gpu-products.txt").read_text(encoding="utf-8")
    )
    found: set[str] = set()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            found |= {line.replace("[NVIDIA-]", each, 1) for each in ("NVIDIA-", "")}
    return frozenset(found)


def _parts(name: str) -> list[str]:
    """The parts of a name in lower case, without those that say whose it is."""
    return [each for each in re.split(r"[-_ ]+", name.lower()) if each not in ("nvidia", "tesla", "")]


def _meant(name: str) -> list[str]:
    """The products that are meant by a name that none has: a slip in case, blanks or letters, or a part of a
    name. There are none where it may be one that is not known here: another model, another memory."""
    parts = _parts(name)
    return sorted(
        each
        for each in products()
        if f"NVIDIA-{each}" not in products() and (_is_part(parts, _parts(each)) or _is_misspelt(name, each))
    )


def _is_part(parts: Sequence[str], known: Sequence[str]) -> bool:
    """Whether a name has nothing but parts of another, a form or a memory shortened, as SXM for SXM4."""
    if sorted(parts) == sorted(known):
        return True
    if not any(part.upper() in _WHOLE for part in parts):
        return False
    rest = list(known)
    for part in parts:
        short = not _MODEL.fullmatch(part) and len(part) >= 3
        found = next((each for each in rest if each == part or (short and each.startswith(part))), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _is_misspelt(name: str, known: str) -> bool:
    """Whether one part of a name has letters that differ, and it is no model's number."""
    ours, theirs = name.split("-"), known.split("-")
    differing = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
    if len(ours) != len(theirs) or len(differing) != 1:
        return False
    here, there = differing[0]
    if min(len(here), len(there)) < 3 or _MODEL.fullmatch(here) or _MODEL.fullmatch(there):
        return False
    alike = difflib.SequenceMatcher(None, here, there).ratio() >= 0.7
    return alike and _digits(here) == _digits(there)
