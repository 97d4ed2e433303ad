"""Engines in pods: which containers are one, and what their command lines say.

container ─▶ command, args (with $(VARIABLES) as far as they are known) ─▶ Engine: flags, model, ports
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .cluster import Container, Keys, Objects, Pod, Thing, items, mapping
from .finding import Word
from .sources import documents_of

_VLLM = re.compile(
    r"(^|/)vllm(-[a-z0-9-]+)?(/vllm[a-z0-9-]*)?(:|@|$)|(^|/)vllm[a-z0-9-]*(:|@|$)|lmcache/vllm"
)
_PENSTOCK = re.compile(r"(^|/)penstock[a-z0-9-]*(:|@|$)")
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_SCRIPT = re.compile(r"-[a-z]{0,4}c[a-z]{0,4}")
"""Of a shell: a script follows, as after `-c` and `-euc`."""
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d{1,4}(?:\.\d{1,2})?)\s?[bB](?![A-Za-z0-9])")

_DEPTH = 12
"""Entries within one another that are looked through for containers."""

Kind = Literal["vllm", "penstock"]


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A container that serves a model."""

    container: Container
    kind: Kind
    words: tuple[str, ...]
    """Its command line after the program; variables written out where their values are known."""
    config: Mapping[str, Any]
    """What the file of --config says, where it is among the objects."""

    def flag(self, *names: str) -> str | None:
        """The value of a flag, its long name or others; "" for a switch; None if it is not given."""
        for index, word in enumerate(self.words):
            name, equals, value = word.partition("=")
            if name.replace("_", "-") in names:
                if equals:
                    return value
                following = self.words[index + 1] if index + 1 < len(self.words) else "-"
                return "" if following.startswith("-") and not following[1:2].isdigit() else following
        for name in names:
            for key in (name.removeprefix("--"), name.removeprefix("--").replace("-", "_")):
                if key in self.config:
                    return str(self.config[key])
        return None

    def number(self, *names: str) -> int | None:
        """A flag's value as a whole number."""
        value = self.flag(*names)
        return int(value) if value is not None and re.fullmatch(r"\d{1,12}", value) else None

    def seconds(self, *names: str) -> float | None:
        """A flag's value in seconds."""
        value = self.flag(*names)
        return float(value) if value is not None and re.fullmatch(r"\d{1,6}(\.\d{1,3})?", value) else None

    @property
    def model(self) -> str | None:
        """Path or id of the model; None if it is not known."""
        named = self.flag("--model", "--model-path")
        if named:
            return named
        for index, word in enumerate(self.words):
            if word == "serve" and index + 1 < len(self.words) and not self.words[index + 1].startswith("-"):
                return self.words[index + 1]
        first = self.words[0] if self.words else ""
        return first if first and not first.startswith("-") and first != "serve" else None

    @property
    def is_remote(self) -> bool:
        """Whether its weights are fetched from a hub."""
        model = self.model or ""
        return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None

    @property
    def is_secured(self) -> bool | None:
        """Whether it serves HTTPS; None where a file says so that is not among the objects."""
        if self.flag("--ssl-certfile", "--ssl-keyfile") is not None:
            return True
        return None if self.flag("--config") is not None and not self.config else False

    @property
    def billions(self) -> float | None:
        """Parameters in its model's name, in billions (`8B`); None if there are none."""
        match = _SIZE.search((self.model or "").replace("-", " ").replace("_", " "))
        return float(match[1]) if match else None

    @property
    def devices(self) -> int:
        """GPUs (or slices) of the container; 0 if it has none."""
        found = 0
        for value in self.container.devices().values():
            text = str(value)
            found += int(text) if text.isdigit() else 0
        return found


def engines_of(objects: Objects) -> list[Engine]:
    """All engines, in order."""
    found = []
    for pod in objects.pods:
        for container in pod.containers:
            engine = engine_of(container, objects)
            if engine is not None:
                found.append(engine)
    return found


def containers_of_others(objects: Objects) -> Iterator[Container]:
    """Containers of custom resources, wherever their controllers read pods: those of KServe's
    LLMInferenceService and InferenceService, of a RayCluster's groups. What they say is read, and nothing is
    said of what is not there: the controller may fill it in."""
    owners = {id(pod.owner) for pod in objects.pods}
    for thing in objects.things:
        if id(thing) not in owners and thing.group and "spec" in mapping(thing.document.data):
            yield from _within(thing, ("spec",), thing.get("spec"))


def _within(thing: Thing, keys: Keys, value: Any) -> Iterator[Container]:
    entries = mapping(value).items() if isinstance(value, dict) else enumerate(items(value))
    for key, below in entries if len(keys) < _DEPTH else ():
        if key in ("containers", "initContainers"):
            for index, data in enumerate(items(below)):
                if isinstance(data, dict) and ("image" in data or "args" in data or "command" in data):
                    yield Container(Pod(thing, keys), data, (*keys, key, index), key != "containers")
        elif isinstance(below, dict | list):
            yield from _within(thing, (*keys, key), below)


def engine_of(container: Container, objects: Objects) -> Engine | None:
    """The engine that a container runs, or None."""
    words = [word.text for word in command_of(container)]
    flat: list[str] = []
    for word in words:
        if " " in word.strip() and re.search(r"\b(vllm|penstock)\b", word):
            try:  # sh -c "exec vllm serve … && …"
                flat += shlex.split(word, comments=True)
            except ValueError:
                flat += word.split()
        else:
            flat.append(word)
    kind = _kind(container, flat)
    if kind is None:
        return None
    known = variables_of(container, objects)
    written = tuple(expanded(word, known) for word in flat)
    return Engine(container, kind, written, _config(container, written, objects))


def expanded(word: str, variables: Mapping[str, str | None]) -> str:
    """A word of a command line with the values of its `$(NAME)`, as far as they are known."""
    return _VARIABLE.sub(lambda match: variables.get(match[1]) or match[0], word)


def _kind(container: Container, words: Sequence[str]) -> Kind | None:
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        following = words[index + 1] if index + 1 < len(words) else ""
        if (name == "vllm" and following == "serve") or word.startswith("vllm.entrypoints"):
            return "vllm"
        if name == "penstock":
            return "penstock" if following == "serve" else None
    if container.get("command"):
        return None
    if _PENSTOCK.search(container.image):
        return "penstock" if words[:1] == ["serve"] else None
    if _VLLM.search(container.image) and not re.search(
        r"router|operator|gateway|cache-server", container.image
    ):
        return "vllm"
    # an excerpt without an image: its name and its flags tell
    if not container.image and "vllm" in container.name and "--model" in words:
        return "vllm"
    return None


def is_serving(container: Container) -> bool:
    """Whether a container is one of vLLM's or Penstock's, which listen to the ports that they declare."""
    words = [word.text for word in command_of(container)]
    return _kind(container, words) is not None or _PENSTOCK.search(container.image) is not None


def command_of(container: Container) -> list[Word]:
    """The words of command and args as they are written, with their places."""
    found = []
    for name in ("command", "args"):
        for index, value in enumerate(items(container.data.get(name))):
            if isinstance(value, str | int | float):
                found.append(container.pod.owner.document.word(*container.keys, name, index))
    return found


def variables_of(container: Container, objects: Objects) -> dict[str, str | None]:
    """Variables of a container, and their values where they are known; later ones win, env over envFrom."""
    owner = container.pod.owner
    found: dict[str, str | None] = {}
    if owner.kind == "LeaderWorkerSet":  # its controller writes them
        found |= dict.fromkeys(("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"))
    for each in items(container.data.get("envFrom")):
        prefix = str(mapping(each).get("prefix") or "")
        name = mapping(mapping(each).get("configMapRef")).get("name")
        config = objects.find("ConfigMap", str(name), owner.namespace) if name else None
        for key, value in mapping(config.get("data")).items() if config is not None else ():
            found[prefix + key] = value if isinstance(value, str) else None
    for each in items(container.data.get("env")):
        entry = mapping(each)
        name, value = entry.get("name"), entry.get("value")
        if not isinstance(name, str):
            continue
        reference = mapping(mapping(entry.get("valueFrom")).get("configMapKeyRef"))
        if reference:
            config = objects.find("ConfigMap", str(reference.get("name")), owner.namespace)
            value = mapping(config.get("data")).get(str(reference.get("key"))) if config is not None else None
        found[name] = value if isinstance(value, str) else None
    return found


def is_complete(container: Container, objects: Objects) -> bool:
    """Whether all variables of a container are known by name: no source of them is elsewhere."""
    for each in items(container.data.get("envFrom")):
        entry = mapping(each)
        for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            name = mapping(entry.get(field)).get("name")
            if name is not None and objects.find(kind, str(name), container.pod.owner.namespace) is None:
                return False
        if "secretRef" in entry:
            return False
    return True


def undefined(container: Container, objects: Objects) -> Iterator[tuple[str, Word]]:
    """Variables `$(NAME)` of the command line that the container does not have, and where they stand."""
    if not is_complete(container, objects):
        return
    known = variables_of(container, objects)
    script = False
    for word in command_of(container):
        for match in _VARIABLE.finditer(word.text.replace("$$", "  ")):
            # in a shell's script, $(date) is what date prints; variables are in capitals
            if match[1] not in known and not (script and match[1].islower()):
                yield match[1], word
        script = script or _SCRIPT.fullmatch(word.text) is not None


def mounted(pod: Pod, container: Container, objects: Objects) -> Iterator[tuple[str, str]]:
    """(path, text) of files that ConfigMaps among the objects put into a container."""
    volumes = pod.volumes
    for mount in items(container.data.get("volumeMounts")):
        entry = mapping(mount)
        _, volume = volumes.get(str(entry.get("name")), (0, {}))
        name = mapping(volume.get("configMap")).get("name")
        config = objects.find("ConfigMap", str(name), pod.owner.namespace) if name else None
        if config is None:
            continue
        path, part = str(entry.get("mountPath", "")).rstrip("/"), entry.get("subPath")
        renamed = {
            str(mapping(each).get("key")): str(mapping(each).get("path"))
            for each in items(mapping(volume.get("configMap")).get("items"))
        }
        for key, text in mapping(config.get("data")).items():
            shown = renamed.get(key, key)
            if isinstance(text, str) and (part is None or part == shown):
                yield (path if part is not None else f"{path}/{shown}"), text


def _config(container: Container, words: Sequence[str], objects: Objects) -> Mapping[str, Any]:
    """What `--config FILE` says, if the file comes from a ConfigMap among the objects."""
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name != "--config":
            continue
        path = value or (words[index + 1] if index + 1 < len(words) else "")
        for shown, text in mounted(container.pod, container, objects):
            if shown == path:
                documents, _ = documents_of(text, "")
                return mapping(documents[0].data) if documents else {}
    return {}
