"""Files as objects, and the order in which they are applied: what others need comes first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from penstock.core.errors import StartupError

Object = dict[str, Any]
_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST = 16 << 20
_FIRST = ("Namespace", "CustomResourceDefinition", "PriorityClass", "StorageClass")
"""Without which the API server refuses others; they are applied by themselves, first."""


def read(paths: Sequence[Path], *, recursive: bool = False) -> list[Object]:
    """All objects of files and folders, in the order of the files. Raises StartupError for what is none.

    Folders within are left out unless `recursive`, as kubectl does it: a bundle's hold values for charts of
    others. A folder with a `kustomization.yaml`, or a chart's, is somebody else's to render: see `kind`.
    """
    found: list[Object] = []
    for path in paths:
        for file in _files(path, recursive):
            found += _objects(file, _text(file))
    if not found:
        raise StartupError(
            f"There are no Kubernetes objects in {', '.join(map(str, paths))}.",
            advice="`penstock compile penstock.yaml -o DIR` writes some.",
        )
    seen: dict[tuple[str, str, str], Object] = {}
    for each in found:
        key = (each["kind"], namespace(each) or "", name(each))
        if key in seen and seen[key] != each:
            raise StartupError(
                f"{title(each)} is there twice, and not the same.", advice="Take one of the two out."
            )
        seen[key] = each
    return list(seen.values())


def parse(text: str, where: str) -> list[Object]:
    """Objects of a text, as `kubectl kustomize` writes it. Raises StartupError."""
    return _objects(Path(where), text)


def kind(path: Path) -> str:
    """How a path is rendered: `plain`, `kustomize` or `helm`."""
    if (path / "Chart.yaml").is_file():
        return "helm"
    names = ("kustomization.yaml", "kustomization.yml", "Kustomization")
    return "kustomize" if any((path / name).is_file() for name in names) else "plain"


def stages(objects: Iterable[Object]) -> list[list[Object]]:
    """In two parts: what others cannot be without, and these."""
    first: list[Object] = []
    rest: list[Object] = []
    for each in objects:
        (first if each["kind"] in _FIRST else rest).append(each)
    return [part for part in (first, rest) if part]


def name(it: Object) -> str:
    """Of an object."""
    return str(it["metadata"]["name"])


def namespace(it: Object) -> str | None:
    """Of an object, where it says so."""
    found = it["metadata"].get("namespace")
    return None if found is None else str(found)


def title(it: Object) -> str:
    """As people say it: `Deployment llm-serving/chat`."""
    return f"{it['kind']} {'/'.join(filter(None, (namespace(it), name(it))))}"


def _files(path: Path, recursive: bool) -> Iterator[Path]:
    if path.is_dir():
        # as `kubectl apply -f`: folders in it have what is no object, as values of charts
        for each in sorted(path.rglob("*") if recursive else path.iterdir()):
            hidden = any(part.startswith(".") for part in each.relative_to(path).parts)
            if each.suffix in _SUFFIXES and each.is_file() and not hidden:
                yield each
    elif path.is_file():
        yield path
    else:
        raise StartupError(f"{path} does not exist.")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise StartupError(f"{path} has {path.stat().st_size:,} bytes, which is no manifest.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} cannot be read: {error}.") from error


def _objects(path: Path, text: str) -> list[Object]:
    try:
        documents = [json.loads(text)] if path.suffix == ".json" else list(yaml.safe_load_all(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise StartupError(
            f"{where} is not valid YAML: {getattr(error, 'problem', None) or error}."
        ) from error
    found: list[Object] = []
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, dict) or not {"apiVersion", "kind"} <= set(document):
            raise StartupError(
                f"{path} has a document that is no Kubernetes object: it has no apiVersion and kind.",
                advice="Apply the folder of the bundle alone, or name its files.",
            )
        items = document.get("items")
        for each in items if document["kind"] == "List" and isinstance(items, list) else [document]:
            if not isinstance(each.get("metadata"), dict) or not each["metadata"].get("name"):
                raise StartupError(f"{path} has a {each.get('kind')} without metadata.name.")
            found.append(each)
    return found
