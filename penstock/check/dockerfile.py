"""Dockerfiles: the base image, variables, and the commands that are run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import commands, containers, shell
from .engines import key_in
from .finding import Finding, Word
from .words import Place

_INSTRUCTION = re.compile(r"^\s*([A-Za-z]+)(\s+|$)")
_ASSIGNED = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)=("(?:[^"\\]|\\.)*"|\'[^\']*\'|\S*)')


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, with its continued lines."""

    name: str
    """In capitals."""
    text: str
    """Its arguments, line breaks as they stand; comments between them are blank."""
    line: int
    column: int


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile. Here-documents belong to theirs."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        start = _INSTRUCTION.match(lines[number])
        if start is None or lines[number].lstrip().startswith("#"):
            number += 1
            continue
        first, parts = number, [lines[number][start.end() :]]
        while parts[-1].rstrip().endswith("\\") and number + 1 < len(lines):
            number += 1
            row = lines[number]
            if row.lstrip().startswith("#") or not row.strip():  # Docker takes them away
                row = " " * max(0, len(row) - 1) + "\\"
            parts.append(row)
        for mark in re.findall(r"<<-?\s*['\"]?(\w+)['\"]?", parts[0]):
            while number + 1 < len(lines):
                number += 1
                parts.append(lines[number])
                if lines[number].strip() == mark:
                    break
        yield Instruction(start[1].upper(), "\n".join(parts), first + 1, start.end() + 1)
        number += 1


def examine(text: str, path: str) -> Iterator[Finding]:
    """What is wrong with a Dockerfile."""
    image = ""
    stages: set[str] = set()
    entry: list[Word] | None = None
    command: list[Word] | None = None
    variables: dict[str, Word] = {}
    for each in instructions(text):
        if each.name == "FROM":
            yield from _ends(image, entry, command, variables, path)
            entry = command = None
            variables = {}
            words = [word for word in _split(each) if not word.text.startswith("--")]
            image = words[0].text if words else ""
            if words and image not in stages:
                yield from containers.image(words[0], path)
            if len(words) > 2:
                stages.add(words[2].text)
        elif each.name == "ENV":
            for match in _ASSIGNED.finditer(each.text):
                word = Word(f"{match[1]}={match[2].strip(chr(34) + chr(39))}", *_place(each, match.start()))
                variables[match[1]] = word
                yield from key_in(word, path)
        elif each.name == "RUN":
            yield from shell.examine(
                _RUN_FLAGS.sub(lambda match: " " * len(match[0]), each.text, count=1),
                path,
                line=each.line,
                column=each.column,
                place=Place.CONTAINER,
            )
        elif each.name in ("CMD", "ENTRYPOINT"):
            found = _exec(each)
            if found is None:
                found = [
                    Word("sh", each.line, each.column),
                    Word("-c", each.line, each.column),
                    Word(each.text, each.line, each.column),
                ]
            if each.name == "CMD":
                command = found
            else:
                entry = found
    yield from _ends(image, entry, command, variables, path)


_RUN_FLAGS = re.compile(r"^(\s*--\w[\w-]*(=\S+)?)+")


def _ends(
    image: str,
    entry: list[Word] | None,
    command: list[Word] | None,
    variables: dict[str, Word],
    path: str,
) -> Iterator[Finding]:
    """What a stage's container runs."""
    words = command or []
    if entry is not None:
        words = [*entry, *words] if entry[0].text != "sh" else entry  # a shell's takes no CMD
    elif words:
        words = containers.program_of(image, None, words)
    if containers.engine_of(image) is not None:
        yield from containers.environment(variables.items(), [word.text for word in words], path)
    yield from commands.examine(words, path, place=Place.CONTAINER)


def _exec(each: Instruction) -> list[Word] | None:
    """The words of `["program", "argument"]`."""
    if not each.text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(re.sub(r"\\\n", "\n", each.text))
    except (ValueError, RecursionError):
        return None
    words = []
    at = 0
    for value in values if isinstance(values, list) else []:
        if not isinstance(value, str):
            return None
        found = each.text.find(json.dumps(value, ensure_ascii=False), at)
        at = found + 1 if found >= 0 else at
        line, column = _place(each, max(0, found))
        words.append(Word(value, line, column + 1))
    return words or None


def _split(each: Instruction) -> list[Word]:
    return [Word(match[0], *_place(each, match.start())) for match in re.finditer(r"[^\s\\]+", each.text)]


def _place(each: Instruction, offset: int) -> tuple[int, int]:
    """Line and column of a character of an instruction's text."""
    before = each.text[:offset]
    rows = before.count("\n")
    if rows:
        return each.line + rows, offset - before.rfind("\n")
    return each.line, each.column + offset
