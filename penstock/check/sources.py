"""Texts, and where everything in them stands.

    paths ─▶ walk ─▶ Source (a file: its text, its documents, what is wrong with the text itself)
                        └─ Document (one YAML or JSON document: plain data, and the line of every path in it)

A file may hold several documents; a `kind: List` is one document for each of its items. Texts are somebody
else's work: what is broken is a finding with its line, and sizes, depths and aliases are bounded. It knows no
rule but those of the text itself, and nothing of what documents mean.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .finding import Finding, Rule, Severity, Word
from .tree import Broken, Node, json_tree, yaml_tree

MAX_BYTES = 16 << 20
"""Largest file. The largest bundles of custom resource definitions that are published have 5 MB."""
MAX_FILES = 20_000
"""Most files of a walk."""

BROKEN = Rule(
    "yaml-broken",
    Severity.ERROR,
    "the text is no YAML or JSON",
    "kubectl refuses the file, and nothing in it was checked.",
    "Correct the syntax at this place.",
)
UNREADABLE = Rule(
    "file-unreadable",
    Severity.ERROR,
    "the file cannot be read",
    "Nothing in it was checked.",
    "Name a regular UTF-8 file that may be read.",
)
DUPLICATE_KEY = Rule(
    "yaml-duplicate-key",
    Severity.ERROR,
    "a mapping has the same key twice",
    "The last one wins in silence with some readers, others refuse the file.",
    "Keep one of them.",
)
TEMPLATE = Rule(
    "helm-template",
    Severity.NOTE,
    "a template was not checked",
    "What it becomes hangs on its values.",
    "Check what is rendered: `helm template CHART | penstock check -`.",
)
RULES: tuple[Rule, ...] = (BROKEN, UNREADABLE, DUPLICATE_KEY, TEMPLATE)

_IGNORED = frozenset(
    "node_modules __pycache__ venv site-packages dist-packages target vendor third_party".split()
)
"""Folders of others' work. Those that begin with a dot are ignored, too, except .github and .gitlab."""
_STRUCTURED = frozenset((".yaml", ".yml", ".json"))
_TEXTS = frozenset(
    ".py .js .mjs .cjs .ts .tsx .jsx .go .java .kt .rb .rs .sh .bash .zsh .env .toml .ini .cfg .conf .md "
    ".ipynb .markdown .rst .mdx .txt .service .promql .rules .jsonl".split()
)
_NAMES = re.compile(r"^(?:(?:.*[.-])?(?:Docker|Container)file(?:[.-].*)?|Makefile|justfile|Procfile)$", re.I)
_HELM = re.compile(
    r"\{\{-?\s*\(?\s*(?:[$]?\.(?:Values|Release|Chart|Capabilities|Files|Template)\b|include\b|tpl\b|define\b|"
    r"toYaml\b|(?:if|with|range|default|not|and|or|eq|quote)\b[^}]*\.(?:Values|Release|Chart|Capabilities)\b)"
)
"""What only a chart has. Other braces may be those of an alert's text, or of a dashboard's legend."""
_SEPARATOR = re.compile(r"^---(?=[ \t\r\n]|$)", re.M)
_BAD = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One YAML or JSON document, or one item of a `kind: List`."""

    path: str
    """Of its file, as it was named."""
    data: Any
    """Plain dicts (whose keys are strings), lists, strings, numbers, booleans, None."""
    node: Node
    """Where everything stands."""
    first: int = 1
    """Its first line, from 1; that of its separator."""
    last: int = 1
    """Its last line."""

    def at(self, *keys: str | int) -> tuple[int, int]:
        """Line and column, from 1, of an entry's key or an item; the nearest that is there."""
        return self.node.at(keys)

    def value_at(self, *keys: str | int, offset: int = 0) -> tuple[int, int]:
        """Line and column where a value begins; of its character `offset`, in a scalar.

        Exact in plain, quoted and literal (`|`) scalars without escapes, by its line in others.
        """
        return self.node.value_at(keys, offset)

    def word(self, *keys: str | int) -> Word:
        """A value as a word of a command line: what YAML reads as a number or a boolean is its text."""
        line, column = self.value_at(*keys)
        node = self.node.find(keys)
        return Word(node.text if node is not None and node.text is not None else "", line, column)

    def get(self, *keys: str | int, default: Any = None) -> Any:
        """The value at a path, or the default."""
        return dig(self.data, *keys, default=default)

    def finding(self, rule: Rule, what: str, *keys: str | int, fix: str = "") -> Finding:
        """A finding at a path."""
        line, column = self.at(*keys)
        return Finding(rule, self.path, line, column, what, fix)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A file, or a text that was given."""

    path: str
    """As it was named; `-` for standard input."""
    text: str = ""
    documents: tuple[Document, ...] = ()
    """Empty where the text is neither YAML nor JSON by its name."""
    problems: tuple[Finding, ...] = ()
    """What is wrong with the text itself."""
    structured: bool = False
    """It is YAML or JSON by its name."""
    named: bool = False
    """Somebody asked for this file, not for a folder that has it."""


def dig(data: Any, *keys: str | int, default: Any = None) -> Any:
    """The value at a path in plain data, or the default where something on the way is not there."""
    for key in keys:
        if isinstance(key, str) and isinstance(data, dict):
            if key not in data:
                return default
            data = data[key]
        elif isinstance(key, int) and isinstance(data, list) and -len(data) <= key < len(data):
            data = data[key]
        else:
            return default
    return data


def documents_of(text: str, path: str, *, line: int = 1) -> tuple[list[Document], list[Finding]]:
    """The documents of a YAML text, and what is wrong with it.

    Args:
        path: what findings call it.
        line: the number of its first line, where it is a part of a larger text (a code block).
    """
    if bad := _BAD.search(text):
        place = line + text.count("\n", 0, bad.start())
        return [], [Finding(BROKEN, path, place, 1, f"It has the character U+{ord(bad[0]):04X}.")]
    documents: list[Document] = []
    problems: list[Finding] = []
    template: int | None = None
    for chunk, first in _chunks(text, line):
        end = first + chunk.count("\n") - (1 if chunk.endswith("\n") else 0)
        if helm := _HELM.search(chunk):
            template = template or first + chunk.count("\n", 0, helm.start())
            continue
        try:
            trees, doubles = yaml_tree(chunk, first)
        except Broken as error:
            if (brace := chunk.find("{{")) >= 0:
                template = template or first + chunk.count("\n", 0, brace)
                continue
            problems.append(Finding(BROKEN, path, error.line, error.column, error.what))
            continue
        problems += (
            Finding(DUPLICATE_KEY, path, place, column, f"`{key}` stands here for the second time.")
            for key, place, column in doubles
        )
        for data, node in trees:
            documents += _flat(Document(path, data, node, first, max(first, end)))
    if template is not None:
        problems.append(Finding(TEMPLATE, path, template, 1, "It is a template of Helm."))
    return documents, problems


def read(path: str | os.PathLike[str]) -> Source:
    """A file; `-` is standard input, read as YAML. What cannot be read is a problem of the source."""
    name = os.fspath(path)
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            status = os.stat(name)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe waits for somebody who writes
                return _unreadable(name, "It is no regular file.")
            with open(name, "rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a name with a null byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        return _unreadable(name, f"It cannot be read: {reason}.")
    if len(data) > MAX_BYTES:
        return _unreadable(name, f"It is over {MAX_BYTES >> 20} MiB.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _unreadable(name, f"It is not UTF-8 at byte {error.start}.")
    return read_text(text, name)


def read_text(text: str, path: str) -> Source:
    """A text that was given, under the name of a file, whose suffix says what it is; `-` is YAML."""
    suffix = Path(path).suffix.lower()
    if suffix not in _STRUCTURED and path != "-":
        return Source(path, text)
    if suffix == ".json" or (path == "-" and text.lstrip()[:1] == "{"):
        try:
            data, node = json_tree(text)
        except Broken as error:
            problem = Finding(BROKEN, path, error.line, error.column, error.what)
            return Source(path, text, (), (problem,), True)
        whole = Document(path, data, node, 1, text.count("\n") + 1)
        return Source(path, text, tuple(_flat(whole)), (), True)
    documents, problems = documents_of(text, path)
    return Source(path, text, tuple(documents), tuple(problems), True)


def walk(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Source]:
    """Files, and those of folders that rules know something about, in order of their names.

    A file that is named is read whatever its suffix. Folders that links lead to are not entered.
    """
    seen = 0
    for path in paths:
        name = os.fspath(path)
        if name == "-" or not os.path.isdir(name):
            yield replace(read(name), named=True)
            continue
        for folder, folders, files in os.walk(name):
            folders[:] = sorted(each for each in folders if not _ignored(folder, each))
            for file in sorted(files):
                if not _known(file):
                    continue
                seen += 1
                if seen > MAX_FILES:
                    yield _unreadable(folder, f"There are over {MAX_FILES} files; the rest was not read.")
                    return
                yield read(os.path.join(folder, file))


def _known(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in _STRUCTURED or suffix in _TEXTS or _NAMES.match(name) is not None


def _ignored(folder: str, name: str) -> bool:
    if name in (".github", ".gitlab"):
        return False
    return (
        name.startswith(".") or name in _IGNORED or os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
    )


def _unreadable(path: str, what: str) -> Source:
    return Source(path, problems=(Finding(UNREADABLE, path, 1, 1, what),))


def _chunks(text: str, line: int) -> Iterator[tuple[str, int]]:
    """The documents of a YAML text, each with the number of its first line.

    A `---` in the first column separates documents wherever it stands, so that a broken one hides no other.
    """
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text) if match.start() > 0), len(text)]
    for begin, end in pairwise(starts):
        chunk = text[begin:end]
        yield chunk, line
        line += chunk.count("\n")


def _flat(document: Document) -> list[Document]:
    """The items of a `kind: List`; else the document itself. An empty document is none."""
    data = document.data
    if data is None:
        return []
    if isinstance(data, dict) and data.get("kind") == "List" and isinstance(data.get("items"), list):
        result: list[Document] = []
        for index, item in enumerate(data["items"]):
            node = document.node.find(("items", index))
            if node is not None and item is not None:
                last = document.node.end_of(("items", index), document.last)
                result.append(Document(document.path, item, node, node.line, last))
        return result
    return [document]
