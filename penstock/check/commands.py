"""Command lines: which program it is, and who knows about it.

    words ─▶ wrappers taken off (sudo, env, timeout, `docker exec`, …) ─▶ the program
             ├─ engines      vllm serve, python -m vllm.entrypoints…, penstock …
             ├─ clients      hey, wrk, ab, curl: load tests and requests
             ├─ containers   docker run: the image, its environment, and the command in it
             └─ sh -c "…"    shell, and from there here again

What a word becomes when the shell expands it (`$VAR`, `$(command)`) is not known: no rule is built on it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence

from . import clients, containers, engines
from .finding import Finding, Word
from .words import Place, is_unknown

_WRAPPERS = frozenset(
    "sudo doas env nohup time exec nice ionice timeout numactl taskset stdbuf setsid command builtin uv uvx "
    "pipx poetry pdm hatch run conda mamba micromamba xargs watch nsys profile chrt tini dumb-init".split()
)
_WITH_VALUE = frozenset("-u -g -n -k -s -c -N -m -p -i -I --user --signal --cpunodebind --membind".split())
_SHELLS = frozenset("sh bash zsh dash ash ksh".split())
_MOST_DEPTH = 4
"""Commands in commands."""

RULES = (*engines.RULES, *clients.RULES, *containers.RULES)


def examine(
    words: Sequence[Word], path: str, *, place: Place = Place.POD, depth: int = 0
) -> Iterator[Finding]:
    """What is wrong with one command line.

    Args:
        words: as the program gets them, without quotes; unexpanded variables as they are written.
        path: of the file, for findings.
        place: where the command runs; what is open to all on a host is not in a pod.
    """
    if depth > _MOST_DEPTH:
        return
    environment, words = _unwrapped(words)
    if not words:
        return
    name = posixpath.basename(words[0].text)
    rest = words[1:]
    if name in _SHELLS:
        yield from _script(rest, path, place, depth)
    elif name == "vllm" and rest and rest[0].text == "serve":
        yield from engines.vllm(rest[1:], path, place, environment)
    elif name.startswith("python") or name == "pypy3":
        yield from _python(rest, path, place, environment)
    elif name == "penstock":
        yield from engines.penstock(rest, path, place, environment)
    elif name.startswith("-") and engines.looks_like_vllm(words):
        yield from engines.vllm(words, path, place, environment)
    elif name in clients.PROGRAMS:
        yield from clients.examine(name, words, path)
    elif name in ("docker", "podman", "nerdctl"):
        yield from _docker(rest, path, depth)
    elif name in ("kubectl", "oc"):
        inner = _after_dashes(rest) if rest and rest[0].text in ("exec", "run", "debug") else []
        yield from examine(inner, path, place=Place.POD, depth=depth + 1)
    elif name == "helm":
        yield from containers.helm(rest, path)


def _unwrapped(words: Sequence[Word]) -> tuple[dict[str, Word], Sequence[Word]]:
    """Variables that are set for the command, and the command without what only starts it."""
    environment: dict[str, Word] = {}
    index = 0
    wrapped = False
    while index < len(words):
        text = words[index].text
        name, equals, _ = text.partition("=")
        if equals and name.isidentifier():
            environment[name] = words[index]
        elif posixpath.basename(text) in _WRAPPERS:
            wrapped = True
        elif wrapped and text.startswith("-"):
            if text in _WITH_VALUE and index + 1 < len(words):
                index += 1
        elif not (wrapped and text.rstrip("smhd").replace(".", "").isdigit()):
            break
        index += 1
    return environment, words[index:]


def _python(
    words: Sequence[Word], path: str, place: Place, environment: dict[str, Word]
) -> Iterator[Finding]:
    for index, word in enumerate(words[:8]):
        if word.text == "-m" and index + 1 < len(words):
            module, rest = words[index + 1].text, words[index + 2 :]
            if module.startswith("vllm.entrypoints") and module.endswith("api_server"):
                yield from engines.vllm(rest, path, place, environment)
            elif module in ("penstock", "penstock.cli.main"):
                yield from engines.penstock(rest, path, place, environment)
            return
        if not word.text.startswith("-"):
            return


def _script(words: Sequence[Word], path: str, place: Place, depth: int) -> Iterator[Finding]:
    """`sh -c "…"`: the text is a script of its own."""
    from . import shell

    for index, word in enumerate(words[:6]):
        if word.text.startswith("-") and not word.text.startswith("--") and word.text.endswith("c"):
            if index + 1 < len(words):
                script = words[index + 1]
                yield from shell.examine(
                    script.text,
                    path,
                    line=script.line,
                    column=script.column,
                    place=place,
                    depth=depth + 1,
                )
            return


def _docker(words: Sequence[Word], path: str, depth: int) -> Iterator[Finding]:
    if words and words[0].text == "container":
        words = words[1:]
    if not words:
        return
    if words[0].text in ("run", "create"):
        found = containers.docker_run(words[1:])
        if found is None:
            return
        yield from containers.of_run(found, path)
        inner = containers.program_of(found.image.text, found.entrypoint, found.command)
        environment = found.environment
        # a container's port is open to others only where it is published: that is said of the run
        yield from examine([*_assigned(environment), *inner], path, place=Place.CONTAINER, depth=depth + 1)
    elif words[0].text == "exec":
        rest = list(words[1:])
        while rest and rest[0].text.startswith("-"):
            rest = (
                rest[2:] if rest[0].text in ("-e", "-u", "-w", "--env", "--user", "--workdir") else rest[1:]
            )
        yield from examine(rest[1:], path, place=Place.CONTAINER, depth=depth + 1)
    elif words[0].text == "pull":
        for word in words[1:]:
            if not word.text.startswith("-") and not is_unknown(word.text):
                yield from containers.image(word, path)


def _assigned(environment: dict[str, Word]) -> list[Word]:
    return [word for word in environment.values() if "=" in word.text]


def _after_dashes(words: Sequence[Word]) -> Sequence[Word]:
    for index, word in enumerate(words):
        if word.text == "--":
            return words[index + 1 :]
    return []
