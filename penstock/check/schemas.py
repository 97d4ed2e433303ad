"""Objects against schemas: the core's from the package `kubernetes-validate`, custom ones from their
definitions (CustomResourceDefinition), which a folder gives.

    Deployment apps/v1 ─▶ deployment-apps-v1.json + _definitions.json of one Kubernetes version
    ScaledObject keda.sh/v1alpha1 ─▶ the text that defines it, found by its kind, read when it is first met

Both are read strictly: a field that is not there is an error, as `kubectl apply` has it. The validator is
jsonschema.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from penstock.core.near import meant

from .cluster import BUILT_IN, Objects, Thing, quantity
from .enumerations import tighten
from .finding import Finding, Rule, Severity
from .sources import Document

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

SCHEMA = Rule(
    "schema",
    Severity.ERROR,
    "an object is not as its kind's schema has it",
    "The API server refuses it, or kubectl does; a field that nobody knows is dropped in silence by others.",
    "Write the field as the schema of this kind has it (`kubectl explain`).",
)
REMOVED = Rule(
    "api-removed",
    Severity.ERROR,
    "a version of an API that Kubernetes no longer has",
    "The API server answers `no matches for kind`.",
    "Write the version that is served today.",
)
UNKNOWN = Rule(
    "kind-unknown",
    Severity.ERROR,
    "a kind that Kubernetes and the given definitions do not have",
    "The API server answers `no matches for kind`.",
    "Correct kind or apiVersion; give the definition of a custom resource with --crds.",
)
UNCHECKED = Rule(
    "schema-unchecked",
    Severity.NOTE,
    "objects were not checked against schemas",
    "Misspelt fields are not found.",
    "Core objects: `pip install 'penstock[check]'`. Custom resources: give their definitions with --crds.",
)
QUANTITY = Rule(
    "quantity-invalid",
    Severity.ERROR,
    "a quantity that Kubernetes does not read, or that cannot be meant",
    "The API server refuses the object; or, with a unit of another size, the pod gets a billionth of it.",
    "Write 500m or 4 for CPUs, 16Gi (2^30) or 16G (10^9) for bytes.",
)
NAME = Rule(
    "name-invalid",
    Severity.ERROR,
    "a name or a label that Kubernetes does not take",
    "The API server refuses the object.",
    "Small letters, digits and dashes, letters and digits at both ends; labels have at most 63 characters.",
)
OPEN = Rule(
    "placeholder-unchecked",
    Severity.NOTE,
    "a value that is filled in before the object is applied",
    "Kubernetes would refuse it as it stands here.",
    "Check what comes out: `envsubst < FILE | penstock check -`.",
)
RULES = (SCHEMA, REMOVED, UNKNOWN, UNCHECKED, QUANTITY, NAME, OPEN)

_OPEN = re.compile(r"(?:^|: )[^ ]*\$(?:\{|[A-Z])")
"""A finding about a value that `envsubst`, Flux or Terraform fill in."""
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_STRICT_LABEL = frozenset(("Service", "Namespace"))
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST = 20
"""Findings of one object."""


def version() -> str | None:
    """The newest Kubernetes version whose schemas are installed, as `1.37`; None if none are."""
    found = _versions()
    return found[-1] if found else None


@cache
def _folder() -> Path | None:
    # the package itself is not imported: it brings YAML readers and more, which takes longer than all else
    spec = importlib.util.find_spec("kubernetes_validate")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "kubernetes-json-schema"


@cache
def _versions() -> tuple[str, ...]:
    folder = _folder()
    if folder is None or not folder.is_dir():
        return ()
    names = (re.fullmatch(r"v(\d+)\.(\d+)\.\d+-local-strict", each.name) for each in folder.iterdir())
    return tuple(f"{a}.{b}" for a, b in sorted((int(each[1]), int(each[2])) for each in names if each))


def chosen(wanted: str | None) -> str | None:
    """The version to check against: the newest that is not newer than the wanted one. None if there is none.

    Raises:
        ValueError: the wanted one is no version, or older than all that are installed.
    """
    versions = _versions()
    if not versions or wanted is None:
        return versions[-1] if versions else None
    match = re.fullmatch(r"v?(\d{1,3})\.(\d{1,3})(\.\d+)?", wanted)
    if match is None:
        raise ValueError(f"{wanted} is no version of Kubernetes. Installed: {', '.join(versions)}.")
    pair = (int(match[1]), int(match[2]))
    fitting = [each for each in versions if tuple(map(int, each.split("."))) <= pair]
    if not fitting:
        raise ValueError(f"There are no schemas of Kubernetes {wanted}. Installed: {', '.join(versions)}.")
    return fitting[-1]


def examine(objects: Objects, crds: Sequence[Path] = (), kubernetes: str | None = None) -> Iterator[Finding]:
    """What schemas, and what Kubernetes asks of names and quantities, say against objects."""
    told: set[str] = set()
    for finding in _all(objects, crds, kubernetes):
        if not _OPEN.search(finding.what):
            yield finding
        elif finding.path not in told:
            told.add(finding.path)
            what = "Values with `$` are filled in before it is applied: they were not checked."
            yield replace(finding, rule=OPEN, what=what, fix="")


def _all(objects: Objects, crds: Sequence[Path], kubernetes: str | None) -> Iterator[Finding]:
    release = chosen(kubernetes)
    definitions = Definitions(crds, objects.documents)
    unchecked: dict[str, Thing] = {}
    core: Thing | None = None
    for thing in objects.things:
        yield from _names(thing)
        yield from _quantities(thing)
        if thing.group == "" or thing.group in BUILT_IN or re.fullmatch("[a-z]+", thing.group):
            if release is None:
                core = core or thing
                continue
            schema = _core_schema(release, thing.group, thing.version, thing.kind)
            if schema is None:
                yield _absent(thing, release)
            else:
                yield from _violations(thing, schema, release)
            continue
        if thing.kind == "CustomResourceDefinition":
            continue
        custom = definitions.find(thing.group, thing.version, thing.kind)
        if isinstance(custom, str):
            yield thing.finding(UNKNOWN, custom, "apiVersion")
        elif custom is not None:
            yield from _violations(thing, custom, None)
        else:
            unchecked.setdefault(thing.kind, thing)
    if core is not None:
        yield core.finding(UNCHECKED, "kubernetes-validate is not installed: core objects were not checked.")
    if unchecked:
        first = next(iter(unchecked.values()))
        yield first.finding(UNCHECKED, f"There is no definition of {', '.join(sorted(unchecked))}.")


@cache
def _shared(release: str) -> Any:
    from referencing import Registry, Resource

    folder = _folder()
    assert folder is not None
    with open(folder / f"v{release}.0-local-strict" / "_definitions.json", encoding="utf-8") as file:
        registry: Any = Registry()
        contents = json.load(file)
    tighten(contents["$defs"])
    return Resource.from_contents(contents) @ registry


@cache
def _core_schema(release: str, group: str, number: str, kind: str) -> Any:
    """A validator of a core kind, or None if there is no such kind in that release."""
    from jsonschema import Draft202012Validator

    folder = _folder()
    assert folder is not None
    short = group.split(".")[0]
    name = f"{kind.lower()}-{short}-{number}.json" if short else f"{kind.lower()}-{number}.json"
    path = folder / f"v{release}.0-local-strict" / name
    if not re.fullmatch(r"[a-z0-9-]{1,200}\.json", name) or not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        schema = json.load(file)
    allowed = schema.get("properties", {}).get("kind", {}).get("enum")
    if allowed and kind not in allowed:
        return None
    tighten({f"{short or 'core'}.{number}.{kind}": schema})
    return Draft202012Validator(schema, registry=_shared(release))


def _absent(thing: Thing, release: str) -> Finding:
    """What to say of a kind that a release does not have: another version may be served."""
    folder = _folder()
    assert folder is not None
    found = sorted(
        match[1]
        for each in (folder / f"v{release}.0-local-strict").glob(f"{thing.kind.lower()}-*.json")
        if (match := re.fullmatch(rf"{thing.kind.lower()}-((?:[a-z]+-)?v\d[a-z0-9]*)\.json", each.name))
    )
    at = f"{thing.group}/{thing.version}".lstrip("/")
    if not found:
        kinds = _kinds(release)
        hint = meant(thing.kind, kinds, 0.8)
        what = f"Kubernetes {release} has no kind {thing.kind} in {at}. {hint}".strip()
        return thing.finding(UNKNOWN, what, "kind")
    served = [each.replace("-", "/", 1) for each in found]
    stable = [each for each in served if re.search(r"(^|/)v\d+$", each)] or served
    group = thing.group.split(".")[0]
    same = [each for each in stable if each.startswith(f"{group}/")] or stable
    full = thing.group if same[-1].startswith(f"{group}/") and "." in thing.group else ""
    wanted = f"{full}/{same[-1].rpartition('/')[2]}" if full else same[-1]
    return thing.finding(
        REMOVED,
        f"Kubernetes {release} has no {thing.kind} in {at}.",
        "apiVersion",
        fix=f"apiVersion: {wanted}",
    )


@cache
def _kinds(release: str) -> tuple[str, ...]:
    shared = _shared(release)
    contents = next(iter(shared.values())).contents if hasattr(shared, "values") else {}
    return tuple(sorted({name.rpartition(".")[2] for name in contents.get("$defs", {}) if ".api." in name}))


class Definitions:
    """Custom resource definitions: those of given files and folders, and those among the documents."""

    def __init__(self, paths: Sequence[Path], documents: Sequence[Document] = ()) -> None:
        files = [
            file for path in paths for file in (sorted(path.rglob("*.y*ml")) if path.is_dir() else [path])
        ]
        self._files = tuple((file, file.stat().st_mtime_ns) for file in files if file.is_file())
        self._ours = [each.data for each in documents if _is_definition(each.data)]

    def find(self, group: str, number: str, kind: str) -> Any:
        """A validator; a text that says what is wrong with version or kind; None where nothing defines it."""
        found = _among(self._ours, group, number, kind)
        return _in_files(self._files, group, number, kind) if found is None else found


def _among(definitions: Iterable[Any], group: str, number: str, kind: str) -> Any:
    for data in definitions:
        spec = data["spec"]
        if spec.get("group") != group or spec["names"].get("kind") != kind:
            continue
        versions = [each for each in spec["versions"] if isinstance(each, dict)]
        for each in versions:
            if each.get("name") == number:
                schema = each.get("schema")
                return _custom(schema.get("openAPIV3Schema", {}) if isinstance(schema, dict) else {})
        served = ", ".join(str(each.get("name")) for each in versions if each.get("served"))
        return f"{kind} is served as {group}/{{{served}}}, not {number}."
    return None


@cache
def _in_files(files: tuple[tuple[Path, int], ...], group: str, number: str, kind: str) -> Any:
    texts = [text for file in files for text in _texts(*file)]
    found = _among(_parsed(texts, group, kind), group, number, kind)
    if found is None and any(re.search(rf"^\s+group: {re.escape(group)}\s*$", text, re.M) for text in texts):
        return f"{group} has no kind {kind}."
    return found


def _parsed(texts: Sequence[str], group: str, kind: str) -> Iterator[Any]:
    # a bundle of definitions takes seconds to read; one of them, a fraction
    for text in texts:
        if f"kind: {kind}\n" in text and group in text:
            try:  # no places are needed: libyaml alone is ten times as fast
                data = yaml.load(text, Loader=_LOADER)
            except yaml.YAMLError:
                continue
            if _is_definition(data):
                yield data


def _is_definition(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and data.get("kind") == "CustomResourceDefinition"
        and isinstance(data.get("spec"), dict)
        and isinstance(data["spec"].get("names"), dict)
        and isinstance(data["spec"].get("versions"), list)
    )


@cache
def _texts(file: Path, changed: int) -> tuple[str, ...]:
    """The documents of a YAML file, not read yet."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return tuple(re.split(r"^---(?=\s)", text, flags=re.M))


def _custom(schema: Mapping[str, Any]) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(_strict(schema, top=True))


def _strict(schema: Any, *, top: bool = False) -> Any:
    """A definition's schema as JSON Schema, in which fields that it does not have are refused.

    Only what says how data is built is strict; what is beneath anyOf, not and their like is a condition.
    """
    if not isinstance(schema, dict):
        return schema
    result = {key: value for key, value in schema.items() if key not in ("default", "description", "format")}
    preserve = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {name: _strict(each) for name, each in properties.items()}
        if top:
            result["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
        if "additionalProperties" not in schema and not preserve:
            result["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        result["items"] = _strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["type"] = ["integer", "string"]
    elif isinstance(schema.get("type"), str):
        # a null is dropped by the API server, and then is not there
        result["type"] = [schema["type"], "null"]
        if isinstance(schema.get("enum"), list):
            result["enum"] = [*schema["enum"], None]
    return result


def _violations(thing: Thing, validator: Any, release: str | None) -> Iterator[Finding]:
    seen = 0
    for error in validator.iter_errors(thing.document.data):
        for keys, what in _told(error):
            if thing.kind in ("Deployment", "StatefulSet", "DaemonSet") and keys == ("spec", "selector"):
                continue  # `selector-mismatch` tells it, with what to write
            seen += 1
            if seen > _MOST:
                return
            where = ".".join(map(str, keys)) or thing.kind
            of = f" (Kubernetes {release})" if release else ""
            yield thing.finding(SCHEMA, f"{where}: {what}{of}", *keys)


def _told(error: ValidationError) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Paths, and what is wrong there, in words."""
    keys = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = sorted(error.schema.get("properties", {}))
        for name in error.instance:
            if name not in known:
                yield (*keys, name), f"there is no such field. {meant(str(name), known)}".strip()
        return
    if error.validator == "required" and isinstance(error.instance, dict):
        for name in error.validator_value:
            if name not in error.instance:
                yield (*keys, name), "it must be given."
        return
    if error.validator in ("type", "oneOf", "anyOf"):
        kinds = error.validator_value if error.validator == "type" else _kinds_of(error.validator_value)
        if kinds:
            kinds = [kinds] if isinstance(kinds, str) else kinds
            wanted = " or ".join(each for each in kinds if each != "null")
            yield keys, f"{_brief(error.instance)} is no {wanted}."
            return
    if error.validator == "enum":
        options = ", ".join(map(str, (each for each in error.validator_value if each not in (None, ""))))
        hint = meant(str(error.instance), map(str, error.validator_value))
        yield keys, f"{_brief(error.instance)} is none of {options}. {hint}".strip()
        return
    yield keys, _brief(error.message, 160)


def _kinds_of(branches: Any) -> list[str]:
    kinds: list[str] = []
    for each in branches if isinstance(branches, list) else ():
        if not isinstance(each, dict) or set(each) != {"type"}:
            return []
        kinds += [each["type"]] if isinstance(each["type"], str) else each["type"]
    return list(dict.fromkeys(kinds))


def _brief(value: Any, most: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= most else text[: most - 1] + "…"


def _names(thing: Thing) -> Iterator[Finding]:
    metadata = thing.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        if not thing.kind.endswith("List"):
            yield thing.finding(NAME, f"{thing.kind} has no metadata.name.", "metadata")
    elif thing.name:
        if thing.kind == "Service" and not _SERVICE.fullmatch(thing.name):
            yield thing.finding(NAME, f"{thing.name} is no name of a Service.", "metadata", "name")
        elif thing.kind in _STRICT_LABEL and not _LABEL.fullmatch(thing.name):
            yield thing.finding(NAME, f"{thing.name} is no name of a {thing.kind}.", "metadata", "name")
        elif not thing.group.startswith("rbac.") and (
            not _SUBDOMAIN.fullmatch(thing.name) or len(thing.name) > 253
        ):
            yield thing.finding(NAME, f"{thing.name} is no name.", "metadata", "name")
    if thing.namespace and not _LABEL.fullmatch(thing.namespace):
        yield thing.finding(NAME, f"{thing.namespace} is no name of a namespace.", "metadata", "namespace")
    for keys in (
        ("metadata", "labels"),
        ("spec", "selector", "matchLabels"),
        ("spec", "template", "metadata", "labels"),
    ):
        labels = thing.get(*keys)
        for key, value in labels.items() if isinstance(labels, dict) else ():
            if not _KEY.fullmatch(key):
                yield thing.finding(NAME, f"{_brief(key)} is no key of a label.", *keys, key)
            if isinstance(value, str) and not _VALUE.fullmatch(value):
                yield thing.finding(NAME, f"{_brief(value)} is no value of a label.", *keys, key)
            elif value is not None and not isinstance(value, str):
                yield thing.finding(NAME, f"{_brief(value)} is no text.", *keys, key, fix=f'{key}: "{value}"')


def _quantities(thing: Thing) -> Iterator[Finding]:
    for keys, name, value in _resources(thing.document.data, ()):
        amount = quantity(value)
        if amount is None:
            if value is not None:
                near = _near_quantity(value)
                fix = f"{name}: {near}" if near else ""
                yield thing.finding(QUANTITY, f"{_brief(value)} is no quantity.", *keys, fix=fix)
        elif amount < 0:
            yield thing.finding(QUANTITY, f"{value} is below zero.", *keys)
        elif name in ("memory", "sizeLimit", "storage", "ephemeral-storage") and 0 < amount < 2**20:
            yield thing.finding(QUANTITY, f"{name}: {value} is {amount:g} bytes.", *keys)
        elif name == "cpu" and amount > 1024:
            yield thing.finding(QUANTITY, f"cpu: {value} is {amount:g} CPUs.", *keys, fix=f"cpu: {value}m")


def _near_quantity(value: Any) -> str | None:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt])i?b?\s*", str(value), re.IGNORECASE)
    return f"{match[1]}{match[2].upper()}i" if match else None


def _resources(data: Any, keys: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str, Any]]:
    """(path, name, value) of what stands beneath limits and requests, and of sizes of volumes."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("limits", "requests") and keys and keys[-1] == "resources" and isinstance(value, dict):
                for name, amount in value.items():
                    yield (*keys, key, name), name, amount
            elif key == "sizeLimit" and keys and keys[-1] == "emptyDir":
                yield (*keys, key), key, value
            else:
                yield from _resources(value, (*keys, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _resources(value, (*keys, index))
