"""Volumes of weights: what is written to them, by whom, and whether there is room for it.

    `penstock models pull ID NAME --store=DIR`   a Job's, or an init container's
    `hf download ID --local-dir DIR`
    an engine that fetches ID into its cache
        └─▶ the volume at that path ─▶ its size, against the weights of the catalogue's models

The size of a claim counts only where whatever makes its volume keeps to it.
"""

from __future__ import annotations

import contextlib
import math
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import StartupError
from penstock.fleet import catalogue
from penstock.fleet.facts import SCHEMES

from .cluster import Container, Keys, Objects, Pod, Thing, items, listed, mapping, quantity
from .finding import Finding, Rule, Severity
from .serving import Engine, command_of, engine_of, engines_of, variables_of
from .words import is_unknown

SMALL = Rule(
    "volume-small",
    Severity.WARNING,
    "a volume that is smaller than the weights that are fetched onto it",
    "The download ends with `No space left on device`, or its pod is evicted, each time anew; where the "
    "storage keeps to no size, the number misleads.",
    "Twice the weights: the next version of a model is there before the old one goes.",
)
WRITABLE = Rule(
    "weights-writable",
    Severity.NOTE,
    "an engine that may write to the weights that a Job fetches",
    "A fault of one engine, or whoever gets into it, changes the weights of all.",
    "readOnly: true in its volumeMounts.",
)
NEVER = Rule(
    "volume-never-written",
    Severity.WARNING,
    "an emptyDir that all containers mount read-only",
    "It is empty for ever, and whoever writes there fails: Read-only file system.",
    "Drop readOnly where something is written.",
)
RULES = (SMALL, WRITABLE, NEVER)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SLACK = 0.95
"""Share of the catalogue's bytes that weights have at least."""
_NOMINAL = re.compile(
    r"efs|nfs|local|host-?path|fuse|s3|blob|bucket|gcs|juice|alluxio|fluid|cephfs|manual|static|dummy|^-?$",
    re.I,
)
"""In a class of storage: its volumes are a share of something, and have no size of their own."""
_FORMATS = (None, "auto", "hf", "safetensors", "mistral", "pt")
"""Values of --load-format with which an engine reads weights from its cache."""


@dataclass(frozen=True, slots=True)
class Store:
    """What a container pulls into a store of weights."""

    container: Container
    claim: str | None
    """Name of the claim that the store is on; None if it is on another volume."""
    model: str
    name: str
    folder: str
    """Of the store, within the volume."""
    path: str
    """Of the store, within the container."""

    @property
    def owner(self) -> Thing:
        return self.container.pod.owner


def examine(objects: Objects) -> Iterator[Finding]:
    """Volumes that are too small, or open to whoever reads them."""
    stores = list(stores_of(objects))
    yield from _sizes(objects, stores)
    filled = {
        (each.claim, each.owner.namespace)
        for each in stores
        if each.claim is not None and each.owner.kind in ("Job", "CronJob")
    }
    for engine in engines_of(objects):
        yield from _writable(engine, filled)
    for pod in objects.pods:
        yield from _never(pod)


def mounts_of(container: Container) -> dict[str, Mapping[str, Any]]:
    """Path → volume."""
    volumes = container.pod.volumes
    found = {}
    for each in items(container.data.get("volumeMounts")):
        path = mapping(each).get("mountPath")
        if isinstance(path, str) and path.startswith("/"):
            found[path.rstrip("/") or "/"] = volumes.get(str(mapping(each).get("name")), (0, {}))[1]
    return found


def is_under(path: str, folder: str) -> bool:
    """Whether a path is a folder, or in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def volume_at(container: Container, path: str) -> tuple[Mapping[str, Any] | None, str]:
    """The volume that a path is on, None if it is on none, and the path within it."""
    mounts = mounts_of(container)
    over = max((each for each in mounts if is_under(path, each)), key=len, default=None)
    return (None, "") if over is None else (mounts[over], path.removeprefix(over).strip("/"))


def stores_of(objects: Objects) -> Iterator[Store]:
    """What `penstock models pull` writes, in Jobs and before engines."""
    for pod in objects.pods:
        for container in pod.all_containers:
            words = [each.text for each in command_of(container)]
            if words[:3] != ["penstock", "models", "pull"] or any(map(is_unknown, words)):
                continue
            plain = [each for each in words[3:] if not each.startswith("-")]
            path = next((each[8:] for each in words if each.startswith("--store=")), None)
            if path is None or len(plain) != 2:
                continue
            volume, folder = volume_at(container, path)
            if volume is not None:
                claim = mapping(volume.get("persistentVolumeClaim")).get("claimName")
                known = claim if isinstance(claim, str) else None
                yield Store(container, known, plain[0], plain[1], folder, path)


def _fetched(objects: Objects, stores: list[Store]) -> Iterator[tuple[Container, str, str, str]]:
    """(container, id of a model, which copy of it, path that it is written to) of all that is fetched."""
    for each in stores:
        yield each.container, each.model, each.name, each.path
    for pod in objects.pods:
        for container in pod.all_containers:
            words = [each.text for each in command_of(container)]
            if words[:2] in (["hf", "download"], ["huggingface-cli", "download"]):
                path = _value(words, "--local-dir")
                plain = [each for each in words[2:] if _ID.fullmatch(each)]
                part = any(each.startswith(("--include", "--exclude")) for each in words)
                if path is not None and len(plain) == 1 and not part and not any(map(is_unknown, words)):
                    yield container, plain[0], path, path
            engine = engine_of(container, objects)
            if engine is not None and engine.is_remote and engine.flag("--load-format") in _FORMATS:
                yield container, str(engine.model), "", _cache(engine, objects)


def _value(words: list[str], name: str) -> str | None:
    for index, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
        if word == name and index + 1 < len(words):
            return words[index + 1]
    return None


def _cache(engine: Engine, objects: Objects) -> str:
    """Where an engine keeps what it fetches: huggingface_hub's rules."""
    known = variables_of(engine.container, objects)
    if (folder := engine.flag("--download-dir")) is not None:
        return folder
    home = known.get("HF_HOME")
    if home is None:
        user = known.get("XDG_CACHE_HOME") or posixpath.join(known.get("HOME") or "/root", ".cache")
        home = posixpath.join(user, "huggingface")
    return known.get("HF_HUB_CACHE") or posixpath.join(home, "hub")


def _weight(model: str) -> int | None:
    """Bytes of a model's weights as they are published; None for what the catalogue does not have."""
    if not _ID.fullmatch(model):
        return None
    with contextlib.suppress(StartupError, ValueError, OSError):
        facts = catalogue.find_model(model)
        return facts.weight_bytes(SCHEMES[facts.native])
    return None


def _sizes(objects: Objects, stores: list[Store]) -> Iterator[Finding]:
    wanted: dict[tuple[int, Keys], tuple[Thing, Keys, float, dict[tuple[str, str], int]]] = {}
    for container, model, copy, path in _fetched(objects, stores):
        volume, _ = volume_at(container, path)
        size = _weight(model)
        found = _room(container.pod, volume, objects) if volume is not None else None
        if found is not None and size is not None:
            thing, keys, _ = found
            wanted.setdefault((id(thing), keys), (*found, {}))[3][model, copy] = size
    for thing, keys, room, models in wanted.values():
        need = sum(models.values())
        if room < need * _SLACK:
            names = listed(sorted({model for model, _ in models}))
            what = f"{thing.get(*keys)} for {names}: {need / 2**30:.0f} GiB of weights."
            fix = f"{keys[-1]}: {math.ceil((2 * need / 2**30 + 10) / 10) * 10}Gi"
            yield thing.finding(SMALL, what, *keys, fix=fix)


def _room(pod: Pod, volume: Mapping[str, Any], objects: Objects) -> tuple[Thing, Keys, float] | None:
    """(object, path of the size, bytes) of a volume that has a size which is kept to."""
    index = next((number for number, each in pod.volumes.values() if each is volume), -1)
    at: Keys = (*pod.keys, "spec", "volumes", index)
    claimed = volume.get("persistentVolumeClaim")
    if "emptyDir" in volume and index >= 0:
        return _size(pod.owner, (*at, "emptyDir"), "sizeLimit")
    if "ephemeral" in volume and index >= 0:
        return _claimed(pod.owner, (*at, "ephemeral", "volumeClaimTemplate", "spec"), objects)
    if claimed is None:
        return None
    name = mapping(claimed).get("claimName")
    if name is None:
        for number, each in enumerate(items(pod.owner.get("spec", "volumeClaimTemplates"))):
            if mapping(mapping(each).get("metadata")).get("name") == volume.get("name"):
                return _claimed(pod.owner, ("spec", "volumeClaimTemplates", number, "spec"), objects)
        return None
    claim = objects.find("PersistentVolumeClaim", str(name), pod.owner.namespace)
    return _claimed(claim, ("spec",), objects) if claim is not None else None


def _claimed(thing: Thing, keys: Keys, objects: Objects) -> tuple[Thing, Keys, float] | None:
    """The size of a claim; None where its volume is made by hand, or by what keeps to no size."""
    spec = mapping(thing.get(*keys))
    name = spec.get("storageClassName")
    made = objects.find("StorageClass", str(name), "") if name is not None else None
    words = [str(name)] if name is not None else []
    words += [str(made.get("provisioner"))] if made is not None else []
    if spec.get("volumeName") or any(_NOMINAL.search(each) for each in words):
        return None
    return _size(thing, (*keys, "resources", "requests"), "storage")


def _size(thing: Thing, keys: Keys, name: str) -> tuple[Thing, Keys, float] | None:
    found = quantity(thing.get(*keys, name))
    return None if found is None else (thing, (*keys, name), found)


def _writable(engine: Engine, filled: Collection[tuple[str, str]]) -> Iterator[Finding]:
    container, model = engine.container, engine.model or ""
    volume, _ = volume_at(container, model) if model.startswith("/") else (None, "")
    claim = mapping(mapping(volume).get("persistentVolumeClaim"))
    namespace = container.pod.owner.namespace
    if (
        volume is None
        or (str(claim.get("claimName")), namespace) not in filled
        or claim.get("readOnly") is True
    ):
        return
    for index, each in enumerate(items(container.data.get("volumeMounts"))):
        mount = mapping(each)
        if mount.get("name") == volume.get("name") and mount.get("readOnly") is not True:
            what = f"{container.name} may write to {mount.get('mountPath')}, which a Job fills."
            yield container.finding(WRITABLE, what, "volumeMounts", index)


def _never(pod: Pod) -> Iterator[Finding]:
    for name, (index, volume) in pod.volumes.items():
        mounts = [
            (container, number, mapping(each))
            for container in pod.all_containers
            for number, each in enumerate(items(container.data.get("volumeMounts")))
            if mapping(each).get("name") == name
        ]
        if (
            index >= 0
            and "emptyDir" in volume
            and mounts
            and all(each.get("readOnly") is True for *_, each in mounts)
        ):
            container, number, _ = mounts[0]
            what = f"No container may write to {name}."
            yield container.finding(NEVER, what, "volumeMounts", number, "readOnly")
