"""Texts that are neither YAML nor JSON: by the kind of file, to those who know it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace

from . import compose, dockerfile, grammars, javascript, markdown, notebook, plain, python, shell, systemd
from .calls import RULES as CALLS
from .finding import Finding
from .markdown import Block

RULES = (
    *CALLS,
    *grammars.RULES,
    *markdown.RULES,
    *shell.RULES,
)

_DOCKERFILE = re.compile(r"^(?:.*[.-])?(?:docker|container)file(?:[.-].*)?$", re.IGNORECASE)
_SCRIPT = re.compile(r"^#!.*\b(?:ba|z|da|k)?sh\b")
_PYTHON_SCRIPT = re.compile(r"^#!.*\bpython[\d.]*\b")
_TEST = re.compile(
    r"(?:^|/)(?:test_[^/]*|[^/]*_test|[^/]*\.(?:test|spec)|conftest)\.(?:py|[cm]?[jt]sx?)$|(?:^|/)(?:__tests__|tests?)/"
)
"""Tests: what they call is a double, mostly. Rules about calls are not for them."""
_KINDS = {
    ".py": "python",
    ".pyi": "",
    ".sh": "shell",
    ".bash": "shell",
    ".zsh": "shell",
    ".env": "shell",
    ".md": "markdown",
    ".markdown": "markdown",
    ".mdx": "markdown",
    ".txt": "plain",
    ".rst": "plain",
    ".js": "javascript",
    ".mjs": "javascript",
    ".cjs": "javascript",
    ".jsx": "javascript",
    ".ts": "typescript",
    ".mts": "typescript",
    ".cts": "typescript",
    ".tsx": "tsx",
    ".ipynb": "notebook",
    ".service": "systemd",
    ".toml": "toml",
    ".jsonl": "jsonl",
}
_LANGUAGES = {
    "python": "python",
    "py": "python",
    "python3": "python",
    "js": "javascript",
    "javascript": "javascript",
    "jsx": "javascript",
    "mjs": "javascript",
    "node": "javascript",
    "ts": "typescript",
    "typescript": "typescript",
    "tsx": "tsx",
    "dockerfile": "dockerfile",
    "docker": "dockerfile",
    "containerfile": "dockerfile",
    "yaml": "yaml",
    "yml": "yaml",
    "ini": "systemd",
    "systemd": "systemd",
    "toml": "toml",
    "jsonl": "jsonl",
    **dict.fromkeys(shell.LANGUAGES, "shell"),
}
_UNNAMED = re.compile(
    r"^\s*(?:[$%] )?(?:vllm serve |python3? -m (?:vllm|penstock)|docker (?:run|compose)|hey |wrk |ab |curl |"
    r"helm |penstock [a-z]|pip install|kubectl |export )"
)


_WHOLE = {
    "dockerfile": dockerfile.examine,
    "notebook": notebook.examine,
    "systemd": systemd.examine,
}
"""Kinds whose lines are counted from 1."""


def kind_of(path: str, text: str) -> str:
    """What kind of text a file has; empty if it is none of ours."""
    name = posixpath.basename(path)
    if _DOCKERFILE.match(name):
        return "dockerfile"
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    if _SCRIPT.match(text):
        return "shell"
    return "python" if _PYTHON_SCRIPT.match(text) else ""


def examine(path: str, text: str) -> Iterator[Finding]:
    """What is wrong with a file that is no YAML and no JSON. Broken and unknown texts have no findings."""
    kind = kind_of(path, text)
    if _TEST.search(path):
        yield from (each for each in _of_file(kind, path, text) if each.rule not in CALLS)
    else:
        yield from _of_file(kind, path, text)


def _of_file(kind: str, path: str, text: str) -> Iterator[Finding]:
    if kind == "markdown":
        yield from markdown.examine(text, path, _of_block)
    elif kind == "plain":
        yield from plain.examine(text, path)
    else:
        yield from _of_kind(kind, text, path, 1)


def _of_kind(kind: str, text: str, path: str, line: int) -> Iterator[Finding]:
    from . import agents, metrics

    if kind in ("python", "javascript", "typescript", "tsx", "shell"):
        yield from metrics.named(text, path, line)
    if kind == "python":
        yield from python.examine(text, path, line=line)
    elif kind in ("javascript", "typescript", "tsx"):
        yield from javascript.examine(text, path, kind, line=line)
    elif kind == "shell":
        yield from shell.examine(text, path, line=line)
    elif kind == "toml":
        yield from agents.examine_toml(text, path, line=line)
    elif kind == "jsonl":
        yield from agents.examine_lines(text, path, line=line)
    elif kind in _WHOLE:
        for finding in _WHOLE[kind](text, path):
            yield _shifted(finding, line)


def _of_block(block: Block, path: str) -> Iterator[Finding]:
    """A code block of a document."""
    kind = _LANGUAGES.get(block.language, "")
    if kind == "yaml":
        yield from _of_yaml(block, path)
        return
    if block.language == "promql":
        from . import metrics

        yield from metrics.queries(block.text, path, block.line)
        return
    if not kind and block.language in ("", "text", "plaintext", "txt") and _UNNAMED.match(block.text):
        kind = "shell"
    yield from _of_kind(kind, block.text, path, block.line)


def _of_yaml(block: Block, path: str) -> Iterator[Finding]:
    """What holds whatever is left out: commands, queries, calls. An excerpt is no valid object, and what it
    refers to is elsewhere."""
    from . import agents, metrics, pod_commands
    from .cluster import objects_of
    from .sources import documents_of

    documents, _ = documents_of(block.text, path, line=block.line)  # what is broken is an excerpt, mostly
    for document in documents:
        for module in (agents, compose, metrics):
            yield from module.rules_of(document, documents)
    yield from pod_commands.examine(objects_of(documents))


def _shifted(finding: Finding, line: int) -> Finding:
    return finding if line == 1 else replace(finding, line=finding.line + line - 1)
