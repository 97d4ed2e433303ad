"""The bundle as a chart of Helm. Objects stay what they are; a few of their values become the chart's.

    object ─▶ marks in place of images, replicas, resources, host ─▶ YAML ─▶ what Helm would take for its own
              is escaped ─▶ marks become {{ .Values… }}

So a template is the object's own text, and `values.yaml` has exactly what was in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from penstock import __version__

from . import monitoring, names, operator
from .objects.base import Object
from .objects.yaml import dump_all
from .workloads import Bundle

NAME = "penstock"
_MARK = re.compile(r"( *)([^\n]*?)@@(\w+):([^@\n]+)@@")
_IMAGES = {"penstock": "penstock", "penstock_cuda": "penstockCuda", "vllm": "vllm"}


def chart(bundle: Bundle, parts: Mapping[str, tuple[Object, ...]], header: str) -> dict[str, str]:
    """Chart.yaml, values.yaml, templates/. The Namespace is not in it: `helm install --create-namespace`."""
    values: dict[str, Any] = {"images": {}, "engines": {}, "gateway": {}}
    templates = {}
    for name, part in parts.items():
        plain = [_marked(bundle, each.to_dict(), values) for each in part if each.kind != "Namespace"]
        if plain:
            templates[f"templates/{name}.yaml"] = _template(dump_all(plain, header))
    entry = bundle.spec.cluster.entry
    if entry is not None:
        values["host"] = entry.host
    return {
        "Chart.yaml": dump_all([_chart(bundle)], header),
        "values.yaml": dump_all([values], f"{header}\nValues that `helm --set` or `-f` may change."),
        ".helmignore": f"README.md\n{monitoring.ADAPTER}/\n{operator.FOLDER}/\n",
        **templates,
    }


def _chart(bundle: Bundle) -> dict[str, Any]:
    return {
        "apiVersion": "v2",
        "name": NAME,
        "description": f"Language models behind one gateway, in the namespace {bundle.namespace}.",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
    }


def _marked(bundle: Bundle, plain: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The object with marks, whose values are added to the chart's."""
    component = plain["metadata"].get("labels", {}).get(names.COMPONENT)
    name = plain["metadata"]["name"]
    if plain["kind"] in ("Deployment", "LeaderWorkerSet") and component in ("engine", "gateway"):
        path = ("gateway",) if component == "gateway" else ("engines", name)
        own = values["gateway"] if component == "gateway" else values["engines"].setdefault(name, {})
        if "replicas" in plain["spec"]:
            own["replicas"] = plain["spec"]["replicas"]
            plain["spec"]["replicas"] = _mark("plain", *path, "replicas")
        for pod in _pods(plain):
            container = pod["spec"]["containers"][0]
            own["resources"] = container["resources"]
            container["resources"] = _mark("yaml", *path, "resources")
    _images(bundle, plain, values)
    entry = bundle.spec.cluster.entry
    if entry is not None and plain["kind"] in ("Ingress", "HTTPRoute", "Certificate"):
        plain["spec"] = _replaced(plain["spec"], entry.host, _mark("quote", "host"))
    return plain


def _pods(plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of an object, at any depth."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "containers" in value.get("spec", {}) if isinstance(value.get("spec"), dict) else False:
                found.append(value)
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    walk(plain)
    return found


def _images(bundle: Bundle, plain: Mapping[str, Any], values: dict[str, Any]) -> None:
    known = {image: _IMAGES[key] for key, image in bundle.images.items()}
    for pod in _pods(plain):
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            key = known.get(container["image"])
            if key is not None:
                values["images"][key] = container["image"]
                container["image"] = _mark("quote", "images", key)


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, old, new) for each in value]
    return new if value == old else value


def _mark(how: str, *path: str) -> str:
    return f"@@{how}:{'/'.join(path)}@@"


def _template(text: str) -> str:
    """Text with marks as Helm's template."""
    lines = []
    for line in text.split("\n"):
        found = _MARK.search(line)
        if found is None:
            lines.append(line.replace("{{", '{{ "{{" }}'))
            continue
        how, path = found[3], found[4].split("/")
        value = _value(path)
        before = line[: found.start(3) - 2].rstrip("'\"")
        if how == "yaml":
            deeper = len(line) - len(line.lstrip(" -")) + 2
            lines.append(f"{before}{{{{- toYaml {value} | nindent {deeper} }}}}")
        else:
            lines.append(f"{before}{{{{ {value}{' | quote' if how == 'quote' else ''} }}}}")
    return "\n".join(lines)


def _value(path: list[str]) -> str:
    """`.Values.gateway.replicas`, or `(index .Values "engines" "chat-burst" "replicas")`."""
    if all(re.fullmatch(r"[A-Za-z]\w*", each) for each in path):
        return ".Values." + ".".join(path)
    return f"(index .Values {' '.join(json.dumps(each) for each in path)})"
