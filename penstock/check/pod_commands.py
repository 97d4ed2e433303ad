"""Containers of pods: their images, variables, command lines, by those who know them (T1, T5, T17, T22)."""

from __future__ import annotations

from collections.abc import Iterator

from . import commands, containers, engines
from .cluster import Container, Objects, items, mapping
from .finding import Finding, Rule, Word
from .serving import command_of, containers_of_others, expanded, variables_of
from .words import Place

RULES: tuple[Rule, ...] = ()


def examine(objects: Objects) -> Iterator[Finding]:
    """What is wrong with what containers run."""
    for pod in objects.pods:
        for container in pod.all_containers:
            yield from _container(container, objects)
    for container in containers_of_others(objects):
        yield from _container(container, objects)


def _container(container: Container, objects: Objects) -> Iterator[Finding]:
    document = container.pod.owner.document
    path = document.path
    image = container.image
    if image:
        yield from containers.image(document.word(*container.keys, "image"), path)
    words = command_of(container)
    entry = bool(items(container.data.get("command")))
    line = words if entry or not image else containers.program_of(image, None, words)
    variables: dict[str, Word] = {}
    for index, each in enumerate(items(container.data.get("env"))):
        name, value = mapping(each).get("name"), mapping(each).get("value")
        if isinstance(name, str):
            at = document.value_at(*container.keys, "env", index, "value" if value is not None else "name")
            variables[name] = Word(f"{name}={value}" if value is not None else name, *at)
    for word in variables.values():
        yield from engines.key_in(word, path)
    for word in words:
        yield from engines.key_in(word, path)
    texts = [word.text for word in words]
    known = containers.engine_of(image) is not None
    if known or any("vllm" in text for text in texts) or engines.looks_like_vllm(words):
        yield from containers.environment(variables.items(), texts, path, is_known=known)
    known_values = variables_of(container, objects)
    written = [Word(expanded(word.text, known_values), word.line, word.column) for word in line]
    yield from commands.examine(written, path, place=Place.POD)
