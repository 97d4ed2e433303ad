"""Jupyter notebooks: each code cell as Python, and its `!commands` as shell, with the lines of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from . import python, shell
from .finding import Finding
from .sources import dig
from .tree import Broken, Node, json_tree


def examine(text: str, path: str) -> Iterator[Finding]:
    """What is wrong with a notebook. Names of one cell are known in those below it."""
    try:
        data, node = json_tree(text)
    except Broken:
        return
    rows: list[str] = []
    places: list[tuple[int, int]] = []
    cells = dig(data, "cells")
    for number, cell in enumerate(cells if isinstance(cells, list) else []):
        source = dig(cell, "source")
        if dig(cell, "cell_type") != "code":
            continue
        lines = source if isinstance(source, list) else str(source or "").splitlines(keepends=True)
        for index, each in enumerate(lines):
            row = str(each).rstrip("\n")
            place = _place(node, number, index if isinstance(source, list) else None)
            if row.lstrip().startswith("!"):
                start = row.index("!") + 1
                for found in shell.examine(" " * start + row[start:], path):
                    yield replace(found, line=place[0], column=place[1] + found.column - 1)
            rows.append("" if row.lstrip().startswith(("!", "%", "?")) else row)
            places.append(place)
    for found in python.examine("\n".join(rows), path):
        line, column = _of_row(places, found.line)
        yield replace(found, line=line, column=column + found.column - 1)


def _place(node: Node, cell: int, index: int | None) -> tuple[int, int]:
    """Line and column where a line of source begins; where it is one string, that of the string."""
    keys: list[str | int] = ["cells", cell, "source"]
    return node.value_at(keys if index is None else [*keys, index])


def _of_row(places: Sequence[tuple[int, int]], row: int) -> tuple[int, int]:
    return places[min(row, len(places)) - 1] if places else (1, 1)
