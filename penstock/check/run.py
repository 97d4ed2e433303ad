"""All rules over all texts.

paths ─▶ sources ─┬─▶ rules of one text (code, shell, Markdown)
                  ├─▶ rules of one document (schemas, queries, commands)
                  └─▶ rules of objects among one another (Objects: who selects, names and mounts whom)
                         └─▶ findings, less what comments ignore, in order of place
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sources, suppress
from .cluster import Objects, objects_of
from .finding import Finding, Rule
from .sources import Document, Source


@dataclass(frozen=True, slots=True)
class Options:
    """What a check is told."""

    crds: tuple[Path, ...] = ()
    """Files and folders with custom resource definitions."""
    kubernetes: str | None = None
    """Version of the Kubernetes schemas, as `1.33`; the newest that is installed if not given."""
    free_gpus: int | None = None
    """GPUs that are free while a new version is rolled out; unknown if not given."""


_OBJECTS = (
    "schemas admission references scalers named matching engine_pods volumes nodes lifecycle security "
    "network entries pod_commands"
)
"""Modules with `examine(objects) -> Iterator[Finding]`; schemas and lifecycle take an option more."""
_DOCUMENTS = "agents compose kinds metrics scrapes spec"
"""Modules with `rules_of(document, all) -> Iterator[Finding]`."""
_SUBJECTS = (
    ("Texts and comments", "sources kinds suppress"),
    ("Objects and their names", "schemas admission references named matching"),
    ("Pods that serve models", "engine_pods volumes nodes"),
    ("Beginning, end, rollout, eviction", "lifecycle"),
    ("Security and spot nodes", "security"),
    ("The way of a request", "network entries"),
    ("Scaling and metrics", "scalers metrics scrapes"),
    ("Command lines and containers", "commands pod_commands compose"),
    ("Calls in code and configurations", "code agents"),
    ("penstock.yaml", "spec"),
)
"""Title → modules with RULES."""


def _modules(names: str) -> list[Any]:
    # rules bring catalogues, tables and parsers: whoever only wants a finding's type does not wait for them
    return [importlib.import_module(f"penstock.check.{name}") for name in names.split()]


def subjects() -> list[tuple[str, tuple[Rule, ...]]]:
    """(title, its rules in order of their ids); each rule is under one title."""
    seen: set[str] = set()
    result = []
    for title, names in _SUBJECTS:
        found = {rule.id: rule for module in _modules(names) for rule in module.RULES if rule.id not in seen}
        seen |= found.keys()
        result.append((title, tuple(found[name] for name in sorted(found))))
    return result


def rules() -> tuple[Rule, ...]:
    """Every rule, in order of its id."""
    return tuple(sorted((rule for _, found in subjects() for rule in found), key=lambda rule: rule.id))


def check(paths: Iterable[str | os.PathLike[str]], options: Options | None = None) -> list[Finding]:
    """What is wrong with files and folders (`-`: standard input), by path and line."""
    return check_sources(list(sources.walk(paths)), options)


def check_text(text: str, path: str = "text.yaml", options: Options | None = None) -> list[Finding]:
    """What is wrong with a text, whose name's suffix says what it is."""
    return check_sources([sources.read_text(text, path)], options)


def check_sources(texts: Sequence[Source], options: Options | None = None) -> list[Finding]:
    """What is wrong with texts, which see one another: objects of all files are one cluster."""
    options = options or Options()
    known = {rule.id for rule in rules()}
    found: dict[str, list[Finding]] = {source.path: list(source.problems) for source in texts}
    documents = [document for source in texts for document in source.documents]
    for finding in (*_of_documents(documents, options), *_of_texts(texts)):
        found.setdefault(finding.path, []).append(finding)
    result: list[Finding] = []
    for source in {source.path: source for source in texts}.values():
        result += suppress.apply(source, found.pop(source.path), known)
    for rest in found.values():
        result += rest
    order = {source.path: index for index, source in enumerate(texts)}
    unique = {(each.rule.id, each.path, each.line, each.column, each.what): each for each in result}
    return sorted(
        unique.values(),
        key=lambda each: (order.get(each.path, len(order)), each.line, each.column, each.rule.id),
    )


def _of_objects(objects: Objects, options: Options) -> Iterator[Finding]:
    for module in _modules(_OBJECTS):
        if module.__name__.endswith(".schemas"):
            yield from module.examine(objects, options.crds, options.kubernetes)
        elif module.__name__.endswith(".lifecycle"):
            yield from module.examine(objects, options.free_gpus)
        else:
            yield from module.examine(objects)


def _of_documents(documents: Sequence[Document], options: Options) -> Iterator[Finding]:
    objects = objects_of(documents)
    if objects.things:
        yield from _of_objects(objects, options)
    for module in _modules(_DOCUMENTS):
        for document in documents:
            yield from module.rules_of(document, documents)


def _of_texts(texts: Sequence[Source]) -> Iterator[Finding]:
    code, kinds = _modules("code kinds")
    for source in texts:
        yield from kinds.examine(source)
        if source.text and not source.structured:
            yield from code.examine(source.path, source.text)
