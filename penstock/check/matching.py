"""Command lines and files of pods against what stands around them: ports, names of models, paths, variables.

    --port=8001                      against the container's ports
    /models/chat/current             against mounts, and what a Job pulls into the claim
    /etc/penstock/penstock.yaml      against the entries of the ConfigMap that is mounted there
    upstreams and *_env of that file against the engines behind its addresses, and the pod's variables

Only what is known for sure counts: a program may bring files, ports and names in its image.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from penstock.core.near import nearest

from .cluster import Container, Objects, Thing, integer, listed, mapping
from .finding import Finding, Rule, Severity, Word
from .references import VARIABLE
from .serving import command_of, engine_of, is_complete, mounted, variables_of
from .sources import Document, documents_of
from .volumes import Store, is_under, mounts_of, stores_of, volume_at
from .words import is_unknown

PORT = Rule(
    "listen-port",
    Severity.ERROR,
    "a server that listens to a port which its container does not declare",
    "Services, probes and policies lead to the declared port, where nothing listens.",
    "Write the same number in --port (or gateway.port) and containerPort.",
)
SERVED = Rule(
    "model-not-served",
    Severity.ERROR,
    "a model that a gateway asks an engine for, which serves it under another name",
    "The engine answers 404 to every request of that route.",
    "Write the same name in --served-model-name and under the upstream's models.",
)
FILE = Rule(
    "file-missing",
    Severity.ERROR,
    "a file of a mounted ConfigMap that it does not have",
    "The program does not find it, ends, and the pod restarts for ever (CrashLoopBackOff).",
    "Name an entry of the ConfigMap.",
)
PATH = Rule(
    "path-unmounted",
    Severity.ERROR,
    "a path beside a mount whose name is nearly the same",
    "The program reads an empty folder of the image, or writes where nobody else sees it.",
    "Write the path of the mount.",
)
WEIGHTS = Rule(
    "weights-path",
    Severity.ERROR,
    "a path of weights that the Job does not write which fills the claim",
    "The engine waits for its weights for ever, or ends at its start.",
    "`penstock models pull ID NAME --store=DIR` writes DIR/NAME/current.",
)
SPEC = Rule(
    "spec-unmounted",
    Severity.ERROR,
    "a gateway whose penstock.yaml is among the objects, and is not mounted where it looks for it",
    "It ends at its start, there is no such file, and the pod restarts for ever (CrashLoopBackOff).",
    "Mount the ConfigMap (or Secret) as a volume at the folder of that path.",
)
RULES = (PORT, SERVED, FILE, PATH, WEIGHTS, SPEC)

_PATH = re.compile(r"(?<![\w.:/$}-])/[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)*")
_STORED = ("current", "versions", "snapshots")
"""What a model's folder in a store has."""


def examine(objects: Objects) -> Iterator[Finding]:
    """What command lines and files say that is not so."""
    stores = [each for each in stores_of(objects) if each.claim is not None]
    for pod in objects.pods:
        for container in pod.all_containers:
            yield from _paths(container, objects)
            yield from _weights(container, stores)
            yield from _listens(container, objects)
        for container in pod.containers:
            yield from _spec(container, objects)
    for file in _gateways(objects):
        yield from _upstreams(file, objects)
        yield from _variables(file, objects)


def _listens(container: Container, objects: Objects) -> Iterator[Finding]:
    declared = {number for each in container.ports if (number := integer(each.get("containerPort")))}
    engine = engine_of(container, objects)
    port = engine.number("--port") if engine is not None else None
    if port is None or not declared or port in declared:
        return
    word = next((each for each in command_of(container) if each.text.startswith("--port")), None)
    what = f"{container.name} listens to {port}; its ports are {listed(sorted(declared))}."
    yield _at(container, PORT, what, word)


def _at(container: Container, rule: Rule, what: str, word: Word | None, fix: str = "") -> Finding:
    if word is None:
        return container.finding(rule, what, "args", fix=fix)
    return Finding(rule, container.pod.owner.document.path, word.line, word.column, what, fix)


def _named(container: Container) -> Iterator[tuple[str, Word]]:
    """Absolute paths in a container's command line."""
    for word in command_of(container):
        for match in _PATH.finditer(word.text):
            yield match[0], word


def _paths(container: Container, objects: Objects) -> Iterator[Finding]:
    mounts = mounts_of(container)
    if not mounts:
        return
    files = {path for path, _ in mounted(container.pod, container, objects)}
    named = list(_named(container))
    idle = [each for each in mounts if not any(is_under(path, each) for path, _ in named)]
    seen: set[str] = set()
    for path, word in named:
        over = max((each for each in mounts if is_under(path, each)), key=len, default=None)
        if path in seen:
            continue
        if over is not None:
            inside = [each for each in files if posixpath.dirname(each) == over]
            if "configMap" in mounts[over] and inside and path != over and path not in files:
                seen.add(path)
                yield _at(container, FILE, f"There is no {path}; there is {listed(sorted(inside))}.", word)
            continue
        for mount in idle:
            top = "/".join(path.split("/")[: mount.count("/") + 1])
            if "configMap" in mounts[mount] or top == mount:
                continue
            if difflib.SequenceMatcher(None, top, mount).ratio() >= 0.85:
                seen.add(path)
                fix = f"Write {mount}{path.removeprefix(top)}, or mount it at {top}."
                yield _at(container, PATH, f"{path} is under no mount; there is {mount}.", word, fix)


def _weights(container: Container, stores: list[Store]) -> Iterator[Finding]:
    seen: set[str] = set()
    for path, word in _named(container) if stores else ():
        volume, inside = volume_at(container, path)
        claim = mapping(mapping(volume).get("persistentVolumeClaim")).get("claimName")
        near = container.pod.owner
        here = [each for each in stores if each.claim == claim and each.owner.near(near)]
        for folder in {each.folder for each in here}:
            if path in seen or (folder and not is_under(inside, folder)):
                continue
            name, _, rest = inside.removeprefix(folder).strip("/").partition("/")
            names = sorted({each.name for each in here if each.folder == folder})
            first = rest.partition("/")[0]
            if name in names and first and first not in _STORED:
                seen.add(path)
                what = f"{path}: a model's folder has {listed(_STORED)}, and no {first}."
                yield _at(container, WEIGHTS, what, word)
            elif name and name not in names and (close := nearest(name, names, 0.7)):
                seen.add(path)
                what = f"{path}: {here[0].owner.kind}s pull {listed(names)}, and no {name}."
                yield _at(container, WEIGHTS, what, word, f"Write {path.replace(name, close, 1)}.")


def _spec(container: Container, objects: Objects) -> Iterator[Finding]:
    words = command_of(container)
    texts = [each.text for each in words]
    if texts[:2] not in (["penstock", "gateway"], ["penstock", "up"]) and texts[:1] != ["gateway"]:
        return
    word = next((each for each in words if re.fullmatch(r"/[^\s$]*\.ya?ml", each.text)), None)
    if word is None or any(is_under(word.text, each) for each in mounts_of(container)):
        return
    name = posixpath.basename(word.text)
    for thing in objects.of("ConfigMap", "Secret"):
        entries = {key for field in ("data", "stringData") for key in mapping(thing.get(field))}
        if name in entries and thing.near(container.pod.owner):
            what = f"Nothing is mounted at {word.text}; {thing.title} has {name}."
            yield _at(container, SPEC, what, word)
            return


@dataclass(frozen=True, slots=True)
class _File:
    """A gateway's penstock.yaml."""

    container: Container
    config: Thing
    key: str
    document: Document

    def finding(self, rule: Rule, what: str, *keys: str | int) -> Finding:
        line, _ = self.document.value_at(*keys)
        start, _ = self.config.document.value_at("data", self.key)
        text = str(self.config.get("data", self.key)).split("\n")
        offset = sum(len(each) + 1 for each in text[: line - 1])
        place = self.config.document.value_at("data", self.key, offset=offset)
        return Finding(rule, self.config.document.path, max(place[0], start), place[1], what)


def _gateways(objects: Objects) -> Iterator[_File]:
    for pod in objects.pods:
        for container in pod.containers:
            words = [each.text for each in command_of(container)]
            if words[:2] != ["penstock", "gateway"] and words[:1] != ["gateway"]:
                continue
            given = {path for path, text in mounted(pod, container, objects) if path in words}
            texts = {text for path, text in mounted(pod, container, objects) if path in given}
            for config in objects.of("ConfigMap"):
                for key, text in mapping(config.get("data")).items():
                    if isinstance(text, str) and text in texts and config.near(pod.owner):
                        documents, _ = documents_of(text, "")
                        if documents and isinstance(documents[0].data, dict):
                            yield _File(container, config, key, documents[0])


def _upstreams(file: _File, objects: Objects) -> Iterator[Finding]:
    declared = {number for each in file.container.ports if (number := integer(each.get("containerPort")))}
    port = integer(file.document.get("gateway", "port"))
    if port is not None and declared and port not in declared:
        what = f"The gateway listens to {port}; its ports are {listed(sorted(declared))}."
        yield file.finding(PORT, what, "gateway", "port")
    for name, upstream in mapping(file.document.get("upstreams")).items():
        for model, entry in mapping(mapping(upstream).get("models")).items():
            asked = mapping(entry).get("name") or model
            for engine, served in _served(str(mapping(upstream).get("url")), file, objects):
                if asked != served:
                    what = f"The upstream {name} is asked for {asked}; {engine} serves {served}."
                    yield file.finding(SERVED, what, "upstreams", name, "models", model)


def _served(url: str, file: _File, objects: Objects) -> Iterator[tuple[str, str]]:
    """(title, name of the model) of engines behind an address, where it is known and there is one."""
    try:
        parts = (urlsplit(url).hostname or "").split(".")
    except ValueError:  # `spec-invalid` tells it
        return
    namespace = parts[1] if len(parts) > 1 else file.container.pod.owner.namespace
    if len(parts) > 2 and parts[2] != "svc":
        return
    service = objects.find("Service", parts[0], namespace)
    for pod in objects.behind(service) if service is not None else ():
        for container in pod.containers:
            engine = engine_of(container, objects)
            if engine is None or engine.flag("--lora-modules", "--enable-lora") is not None:
                continue
            flags = [word for word in engine.words if word.startswith("--served-model-name=")]
            if len(flags) == 1 and not is_unknown(flags[0]):
                yield pod.owner.title, flags[0].partition("=")[2]


def _variables(file: _File, objects: Objects) -> Iterator[Finding]:
    container = file.container
    if not is_complete(container, objects):
        return
    known = variables_of(container, objects)
    for keys, name in _environment(file.document.data, ()):
        if name not in known:
            what = f"{container.name} has no variable {name}, which {keys[-1]} names."
            yield file.finding(VARIABLE, what, *keys)


def _environment(data: Any, keys: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(path, name) of the variables that a spec names."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key.endswith("key_env") and isinstance(value, str):
                yield (*keys, key), value
            else:
                yield from _environment(value, (*keys, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _environment(value, (*keys, index))
