"""YAML and JSON to plain data, with the place of every entry beside it.

    metadata:            Node(1:1) ─ children {"name": Node(2:3, value 2:9, text "a")}
      name: a            data {"metadata": {"name": "a"}}

Values are those that Kubernetes reads: YAML 1.1's booleans, integers and floats, but dates, times and
whatever else a plain scalar might be are strings; keys are strings. Work is bounded: depth, and nodes with
what aliases repeat. PyYAML's events come from libyaml where PyYAML was built with it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

import yaml

MAX_DEPTH = 100
"""Most mappings and lists within one another. Dashboards have 15."""
MAX_NODES = 1_000_000
"""Most scalars, mappings and lists of a document, aliases written out."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TRUE = frozenset("true True TRUE yes Yes YES on On ON".split())
_FALSE = frozenset("false False FALSE no No NO off Off OFF".split())
_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_INT = re.compile(r"[-+]?(?:0b[01_]{1,256}|0o?[0-7_]{1,256}|0x[0-9a-fA-F_]{1,256}|0|[1-9][0-9_]{0,300})")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]{0,300}(?:\.[0-9_]{0,300})?|\.[0-9][0-9_]{0,300})(?:[eE][-+]?[0-9]{1,4})?"
)
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_STRING = "tag:yaml.org,2002:str"


class Broken(ValueError):
    """A text that cannot be read, and where."""

    def __init__(self, what: str, line: int, column: int) -> None:
        super().__init__(what)
        self.what, self.line, self.column = what, line, column


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Where an entry of a mapping, an item of a list or a whole document stands. Lines and columns from 1."""

    line: int
    """Of the key, or of the item."""
    column: int
    value_line: int
    """Of the value."""
    value_column: int
    text: str | None = None
    """Of a scalar, as it was written, whatever it is read as."""
    children: dict[str, Node] | list[Node] | None = None
    starts: tuple[tuple[int, int, int], ...] = ()
    """Of a scalar of several lines: (offset, line, column) of what each contributes."""
    end: int = 0
    """The line where the value ends."""
    size: int = 1
    """Nodes below and with this one."""

    def child(self, key: str | int) -> Node | None:
        if isinstance(self.children, dict):
            return self.children.get(key) if isinstance(key, str) else None
        if isinstance(self.children, list) and isinstance(key, int) and -len(self.children) <= key:
            return self.children[key] if key < len(self.children) else None
        return None

    def find(self, keys: Sequence[str | int]) -> Node | None:
        """The node at a path."""
        node = self
        for key in keys:
            below = node.child(key)
            if below is None:
                return None
            node = below
        return node

    def nearest(self, keys: Sequence[str | int]) -> Node:
        """The node at a path, or the last on the way to it."""
        node = self
        for key in keys:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node

    def at(self, keys: Sequence[str | int]) -> tuple[int, int]:
        """Line and column of the nearest entry or item."""
        node = self.nearest(keys)
        return node.line, node.column

    def value_at(self, keys: Sequence[str | int], offset: int = 0) -> tuple[int, int]:
        """Line and column of a value, or of a character of it."""
        node = self.nearest(keys)
        if node.starts:
            begin, line, column = max(
                (each for each in node.starts if each[0] <= offset), default=node.starts[0]
            )
            return line, column + max(0, offset - begin)
        return node.value_line, node.value_column + offset

    def end_of(self, keys: Sequence[str | int], default: int) -> int:
        """The line where the value at a path ends."""
        node = self.find(keys)
        return node.end if node is not None and node.end else default


def yaml_tree(text: str, line: int = 1) -> tuple[list[tuple[Any, Node]], list[tuple[str, int, int]]]:
    """The documents of a YAML text, and keys that stand twice in a mapping, with their places.

    Args:
        line: the number of the text's first line.

    Raises:
        Broken: it is no YAML, or too deep or too large.
    """
    reader = _Reader(text, line)
    try:
        return list(reader.documents()), reader.doubles
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ". ".join(part for part in (error.problem, error.context) if part)
        raise Broken(
            f"It is no YAML: {what}.", line + (mark.line if mark else 0), mark.column + 1 if mark else 1
        ) from None
    except yaml.YAMLError as error:
        raise Broken(f"It is no YAML: {error}.", line, 1) from None


class _Reader:
    def __init__(self, text: str, line: int) -> None:
        self.text = text
        self.line = line
        self.lines: list[str] | None = None
        self.doubles: list[tuple[str, int, int]] = []
        self.anchors: dict[str, tuple[Any, Node]] = {}
        self.open: set[str] = set()
        self.nodes = 0

    def documents(self) -> Iterator[tuple[Any, Node]]:
        self.events = iter(yaml.parse(self.text, Loader=_LOADER))
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                self.anchors.clear()
                self.nodes = 0
                yield self.value(next(self.events), 0)

    def place(self, mark: yaml.Mark) -> tuple[int, int]:
        return self.line + mark.line, mark.column + 1

    def fail(self, mark: yaml.Mark, what: str) -> Broken:
        return Broken(what, *self.place(mark))

    def count(self, event: yaml.Event, size: int) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            raise self.fail(event.start_mark, f"It has more than {MAX_NODES} entries, aliases written out.")

    def value(self, event: yaml.Event, depth: int) -> tuple[Any, Node]:
        line, column = self.place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            found = self.anchors.get(event.anchor)
            if found is None:
                inside = event.anchor in self.open
                raise self.fail(
                    event.start_mark,
                    f"The alias *{event.anchor} "
                    + ("stands inside its own anchor." if inside else "has no anchor."),
                )
            data, node = found
            self.count(event, node.size)
            return data, replace(node, line=line, column=column)
        if depth > MAX_DEPTH:
            raise self.fail(event.start_mark, f"It is nested more than {MAX_DEPTH} deep.")
        self.count(event, 1)
        if event.anchor is not None:
            self.open.add(event.anchor)
        if isinstance(event, yaml.ScalarEvent):
            data = _scalar(event)
            node = Node(
                line,
                column,
                line,
                column,
                event.value,
                None,
                self.starts(event),
                self.line + event.end_mark.line,
            )
        elif isinstance(event, yaml.SequenceStartEvent):
            data, node = self.sequence(event, depth)
        else:
            data, node = self.mapping(event, depth)
        if event.anchor is not None:
            self.open.discard(event.anchor)
            self.anchors[event.anchor] = data, node
        return data, node

    def sequence(self, start: yaml.Event, depth: int) -> tuple[Any, Node]:
        line, column = self.place(start.start_mark)
        items: list[Any] = []
        nodes: list[Node] = []
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            data, node = self.value(event, depth + 1)
            items.append(data)
            nodes.append(node)
        return items, Node(
            line,
            column,
            line,
            column,
            None,
            nodes,
            (),
            _end(nodes, line),
            1 + sum(each.size for each in nodes),
        )

    def mapping(self, start: yaml.Event, depth: int) -> tuple[Any, Node]:
        line, column = self.place(start.start_mark)
        data: dict[str, Any] = {}
        nodes: dict[str, Node] = {}
        merged: list[tuple[Any, Node]] = []
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if isinstance(event, yaml.AliasEvent):
                _, named = self.value(event, depth + 1)
                if named.text is None:
                    raise self.fail(event.start_mark, "A key of a mapping must be a plain value.")
                name, plain = named.text, False
            elif isinstance(event, yaml.ScalarEvent):
                name, plain = event.value, not event.style
                if event.anchor is not None:
                    self.value(event, depth + 1)
            else:
                raise self.fail(event.start_mark, "A key of a mapping must be a plain value.")
            key_line, key_column = self.place(event.start_mark)
            value, node = self.value(next(self.events), depth + 1)
            if name == "<<" and plain:
                merged += [(value, node)] if isinstance(value, dict) else _items(value, node)
                continue
            if name in data:
                self.doubles.append((name, key_line, key_column))
            data[name] = value
            nodes[name] = replace(node, line=key_line, column=key_column)
        for value, node in merged:
            if isinstance(value, dict) and isinstance(node.children, dict):
                for name in value:
                    if name not in data:
                        data[name], nodes[name] = value[name], node.children[name]
        size = 1 + sum(each.size for each in nodes.values())
        return data, Node(line, column, line, column, None, nodes, (), _end(nodes.values(), line), size)

    def starts(self, event: yaml.ScalarEvent) -> tuple[tuple[int, int, int], ...]:
        """Where the lines of a scalar of several lines begin, in its value and in the text."""
        first, last = event.start_mark.line, event.end_mark.line
        if first == last:
            quote = 1 if event.style in ("'", '"') else 0
            line, column = self.place(event.start_mark)
            return ((0, line, column + 1),) if quote else ()
        if self.lines is None:
            self.lines = self.text.splitlines()
        block = event.style in ("|", ">")
        result = []
        offset = 0
        indent = 0
        body = self.lines[first + 1 : last + (0 if block else 1)] if block else self.lines[first : last + 1]
        if block:
            indent = min((len(each) - len(each.lstrip(" ")) for each in body if each.strip()), default=0)
        for index, each in enumerate(body):
            if event.style == "|":
                result.append((offset, self.line + first + 1 + index, indent + 1))
                offset += max(0, len(each) - indent) + 1
                continue
            begin = event.start_mark.column if index == 0 and not block else 0
            stripped = each[begin:].lstrip(" ")
            column = len(each) - len(stripped)
            if index == 0 and event.style in ("'", '"'):
                column, stripped = column + 1, stripped[1:]
            row = self.line + first + index + (1 if block else 0)
            result.append((offset, row, column + 1))
            following = body[index + 1].strip() if index + 1 < len(body) else ""
            offset += len(stripped.rstrip()) + (1 if following or not stripped.strip() else 0)
        return tuple(result) or ((0, *self.place(event.start_mark)),)


def _items(value: Any, node: Node) -> list[tuple[Any, Node]]:
    if isinstance(value, list) and isinstance(node.children, list):
        return list(zip(value, node.children, strict=True))
    return []


def _end(nodes: Any, line: int) -> int:
    return max((each.end for each in nodes), default=line)


def _scalar(event: yaml.ScalarEvent) -> Any:
    """What a scalar is. Only plain ones without a tag are something else than text."""
    text: str = event.value
    if event.tag is not None or event.style:
        return text if event.tag in (None, "!", _STRING) else _plain(text)
    return _plain(text)


def _plain(text: str) -> Any:
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if _INT.fullmatch(text):
        digits = text.replace("_", "").lstrip("+-").lower()
        sign = -1 if text[0] == "-" else 1
        base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2])
        try:
            if base:
                return sign * int(digits[2:], base)
            return sign * int(digits, 8 if digits.startswith("0") and digits != "0" else 10)
        except ValueError:
            return text
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if special := _SPECIAL.fullmatch(text):
        return float("nan") if special[3] else float(special[1] + "inf")
    return text


_WHITE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,400})(?:\.\d{1,400})?(?:[eE][-+]?\d{1,4})?")
_LITERALS = {"true": True, "false": False, "null": None}


@lru_cache(maxsize=32)  # a dashboard in a ConfigMap is read by each rule that knows one
def json_tree(text: str) -> tuple[Any, Node]:
    """The data of a JSON text, and the places.

    Raises:
        Broken: it is no JSON, or too deep or too large.
    """
    return _Json(text).whole()


class _Json:
    def __init__(self, text: str) -> None:
        self.text = text
        self.breaks = [match.start() for match in re.finditer("\n", text)]
        self.nodes = 0

    def whole(self) -> tuple[Any, Node]:
        try:
            data, node, end = self.value(self.skip(0), 0)
        except json.JSONDecodeError as error:
            raise Broken(f"It is no JSON: {error.msg}.", error.lineno, error.colno) from None
        if (end := self.skip(end)) != len(self.text):
            raise self.fail(end, "It is no JSON: something stands after its end.")
        return data, node

    def skip(self, index: int) -> int:
        match = _WHITE.match(self.text, index)
        return match.end() if match else index

    def place(self, index: int) -> tuple[int, int]:
        row = bisect_left(self.breaks, index)
        return row + 1, index - (self.breaks[row - 1] if row else -1)

    def fail(self, index: int, what: str) -> Broken:
        return Broken(what, *self.place(index))

    def value(self, index: int, depth: int, key: tuple[int, int] | None = None) -> tuple[Any, Node, int]:
        """Data, node and end of the value at an index. `key`: where its key stands."""
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise self.fail(index, f"It is nested more than {MAX_DEPTH} deep.")
        if self.nodes > MAX_NODES:
            raise self.fail(index, f"It has more than {MAX_NODES} entries.")
        begin = self.text[index : index + 1]
        line, column = self.place(index)
        at = key or (line, column)
        if begin == "{":
            return self.mapping(index, depth, at)
        if begin == "[":
            return self.sequence(index, depth, at)
        if begin == '"':
            text, end = scanstring(self.text, index + 1, True)
            return text, Node(*at, line, column, text, None, ((0, line, column + 1),), line), end
        if number := _NUMBER.match(self.text, index):
            data: Any = float(number[0]) if re.search("[.eE]", number[0]) else int(number[0])
            return data, Node(*at, line, column, number[0], end=line), number.end()
        for literal, data in _LITERALS.items():
            if self.text.startswith(literal, index):
                return data, Node(*at, line, column, literal, end=line), index + len(literal)
        raise self.fail(index, "It is no JSON: a value was expected.")

    def sequence(self, index: int, depth: int, at: tuple[int, int]) -> tuple[Any, Node, int]:
        line, column = self.place(index)
        items: list[Any] = []
        nodes: list[Node] = []
        index = self.skip(index + 1)
        while self.text[index : index + 1] != "]":
            data, node, index = self.value(index, depth + 1)
            items.append(data)
            nodes.append(node)
            index = self.following(index, "]")
        size = 1 + sum(each.size for each in nodes)
        return items, Node(*at, line, column, None, nodes, (), self.place(index)[0], size), index + 1

    def mapping(self, index: int, depth: int, at: tuple[int, int]) -> tuple[Any, Node, int]:
        line, column = self.place(index)
        data: dict[str, Any] = {}
        nodes: dict[str, Node] = {}
        index = self.skip(index + 1)
        while self.text[index : index + 1] != "}":
            if self.text[index : index + 1] != '"':
                raise self.fail(index, "It is no JSON: a key in double quotes was expected.")
            where = self.place(index)
            key, index = scanstring(self.text, index + 1, True)
            index = self.skip(index)
            if self.text[index : index + 1] != ":":
                raise self.fail(index, "It is no JSON: `:` was expected.")
            data[key], nodes[key], index = self.value(self.skip(index + 1), depth + 1, where)
            index = self.following(index, "}")
        size = 1 + sum(each.size for each in nodes.values())
        return data, Node(*at, line, column, None, nodes, (), self.place(index)[0], size), index + 1

    def following(self, index: int, end: str) -> int:
        """Past the comma, to what follows it; at the end, to that."""
        index = self.skip(index)
        sign = self.text[index : index + 1]
        if sign == ",":
            after = self.skip(index + 1)
            if self.text[after : after + 1] == end:
                raise self.fail(after, f"It is no JSON: a value was expected before `{end}`.")
            return after
        if sign == end:
            return index
        raise self.fail(index, f"It is no JSON: `,` or `{end}` was expected.")
