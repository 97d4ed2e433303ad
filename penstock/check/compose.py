"""YAML with commands in it that is not Kubernetes': Compose files, the steps of CI, values of charts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from . import commands, containers, engines, shell
from .engines import OPEN, key_in
from .finding import Finding, Rule, Word
from .flags import vllm
from .sources import Document
from .words import Place

RULES: tuple[Rule, ...] = ()

Keys = tuple[str | int, ...]


def rules_of(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """What is wrong with the commands of a document."""
    data = document.data
    if not isinstance(data, dict) or "apiVersion" in data:
        return
    services = data.get("services")
    if isinstance(services, dict):
        for name, service in services.items():
            if isinstance(service, dict):
                yield from _service(document, ("services", name), service)
    elif "env" in data and set(data) <= {"env", "args", "command", "image", "name", "envFrom"}:
        yield from _fragment(document, data)
    else:
        yield from _below(document, (), data, 0)


def _service(document: Document, where: Keys, service: dict[str, Any]) -> Iterator[Finding]:
    path = document.path
    image = service.get("image")
    name = image if isinstance(image, str) else ""
    if name:
        yield from containers.image(document.word(*where, "image"), path)
    variables = dict(_environment(document, (*where, "environment"), service.get("environment")))
    for word in variables.values():
        yield from key_in(word, path)
    entry = _words(document, (*where, "entrypoint"), service.get("entrypoint"))
    command = _words(document, (*where, "command"), service.get("command"))
    words = [*entry, *command] if entry else containers.program_of(name, None, command)
    engine = containers.engine_of(name)
    if engine is not None:
        yield from containers.environment(variables.items(), [word.text for word in words], path)
    if engine == "vllm":
        mounts = [*_texts(service.get("tmpfs")), *_texts(service.get("volumes"))]
        if (
            "shm_size" not in service
            and service.get("ipc") is None
            and not any("/dev/shm" in each for each in mounts)
        ):
            line, column = document.at(*where)
            yield Finding(
                containers.SHM,
                path,
                line,
                column,
                "There is neither shm_size nor ipc.",
                "Write shm_size: 8gb.",
            )
        keyed = (
            "VLLM_API_KEY" in variables
            or "env_file" in service
            or any(word.text.startswith("--api-key") for word in words)
        )
        ports = service.get("ports")
        for index, port in enumerate(ports if isinstance(ports, list) and not keyed else []):
            if _is_published(port):
                line, column = document.value_at(*where, "ports", index)
                what = "The port is published on all addresses; there is no key."
                yield Finding(OPEN, path, line, column, what)
                break
    yield from commands.examine(
        [*(word for name, word in variables.items() if "=" in word.text), *words], path, place=Place.CONTAINER
    )


def _is_published(port: Any) -> bool:
    if isinstance(port, dict):
        return port.get("host_ip") in (None, "", "0.0.0.0") and port.get("published") is not None
    text = str(port)
    return ":" in text and containers.published_to_all(text)


def _environment(document: Document, where: Keys, given: Any) -> Iterator[tuple[str, Word]]:
    """Name → `NAME=value`, from a mapping or a list."""
    if isinstance(given, dict):
        for name in given:
            word = document.word(*where, name)
            line, column = document.at(*where, name)
            yield name, Word(f"{name}={word.text}" if given[name] is not None else name, line, column)
    elif isinstance(given, list):
        for index, each in enumerate(given):
            if isinstance(each, str):
                yield each.partition("=")[0], document.word(*where, index)


def _words(document: Document, where: Keys, given: Any) -> list[Word]:
    """A command as Compose has it: a list of words, or a line that is split as a shell would."""
    if isinstance(given, list):
        return [document.word(*where, index) for index in range(len(given))]
    if isinstance(given, str):
        line, column = document.value_at(*where)
        return shell.words_of(given, lambda offset: document.value_at(*where, offset=offset), line, column)
    return []


def _texts(given: Any) -> list[str]:
    return [str(each) for each in given] if isinstance(given, list) else [str(given)] if given else []


def _fragment(document: Document, data: dict[str, Any]) -> Iterator[Finding]:
    """`env:` of a container, as documentation shows it."""
    variables = data.get("env")
    arguments = [*_texts(data.get("command")), *_texts(data.get("args"))]
    for index, each in enumerate(variables if isinstance(variables, list) else []):
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            word = document.word("env", index, "name")
            yield from containers.environment(
                [(each["name"], word)], arguments, document.path, is_known="image" in data
            )


def _below(document: Document, where: Keys, data: Any, depth: int) -> Iterator[Finding]:
    """Scripts under `run:` (GitHub) and `script:` (GitLab), and flags of vLLM under `args:` and the like (the
    values of charts), wherever they are."""
    if depth > 12:
        return
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        here = (*where, key)
        if key in _SCRIPTS:
            for place, text in [(here, value)] if isinstance(value, str) else _strings(here, value):
                line, column = document.value_at(*place)
                yield from shell.examine(text, document.path, line=line, column=column)
        elif isinstance(key, str) and _ARGUMENTS.search(key) and isinstance(value, list):
            words = [document.word(*place) for place, _ in _strings(here, value)]
            if words and words[0].text.startswith("-") and engines.looks_like_vllm(words):
                yield from engines.of_flags(words, vllm(), document.path)
        else:
            yield from _below(document, here, value, depth + 1)


_SCRIPTS = frozenset("run script before_script after_script".split())
_ARGUMENTS = re.compile(r"args$", re.IGNORECASE)


def _strings(where: Keys, value: Any) -> list[tuple[Keys, str]]:
    items = enumerate(value) if isinstance(value, list) else ()
    return [((*where, index), each) for index, each in items if isinstance(each, str)]
