"""Reading a spec: YAML with lines, so that every error names its place.

    SpecError: penstock.yaml:12: models.demo.pol: unknown key. Did you mean pool?

All errors of a file are told at once.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from penstock.core.errors import StartupError, brief, quote
from penstock.core.near import meant

from .model import Model, Pool, Spec, Team, Upstream, UpstreamModel
from .references import problems
from .routes import Route

MAX_BYTES = 256 << 10
"""Largest file: thousands of teams. Reading YAML with lines takes seconds for so much."""
_MAX_DEPTH = 32
"""Most mappings and lists within one another."""
_MOST_ERRORS = 30
"""What is told of one file."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Path_ = tuple[str | int, ...]

_NAMED: dict[str, type[BaseModel]] = {
    "pools": Pool,
    "models": Model,
    "upstreams": Upstream,
    "routes": Route,
    "teams": Team,
}
"""Parts of a spec that have names to which others refer."""


class SpecError(StartupError):
    """A spec that cannot be used; the message has one line for each place."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader whose work is bounded, and whose errors all have a line.

    No aliases, whose expansion has no bound; and whatever a plain value looks like (a date, a number of a
    thousand digits), but is not, is an error at its place.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _at(event.start_mark, "aliases (*name) are not supported")
        if self._depth >= _MAX_DEPTH:
            raise _at(event.start_mark, f"it is nested more than {_MAX_DEPTH} deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, TypeError, LookupError, AttributeError) as error:
            raise _at(node.start_mark, f"{quote(node.value)} cannot be read: {error}") from None


def _at(mark: yaml.Mark, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, what, mark)


def load(path: Path) -> Spec:
    """The spec in a file. Raises SpecError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe waits for somebody who writes
            raise SpecError(f"{path}: is a directory." if path.is_dir() else f"{path}: is no regular file.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a name with a null byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(
            f"{path}: cannot be read: {reason}.", advice="`penstock init` writes an example."
        ) from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path}: is over {MAX_BYTES} bytes.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not UTF-8 at byte {error.start}.") from None
    return loads(text, str(path))


def loads(text: str, name: str = "penstock.yaml") -> Spec:
    """The spec in a text. `name` is what errors call it. Raises SpecError."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(
            f"{name}:{line}: cannot be read as YAML: there is the character "
            f"U+{ord(text[error.position]):04X}."
        ) from None
    try:
        node = loader.get_single_node()
        found = [] if node is None else [*_duplicates(node), *_unprintable(node)]
        value = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = 1 if mark is None else mark.line + 1
        what = getattr(error, "problem", None) or str(error)
        raise SpecError(f"{name}:{line}: cannot be read as YAML: {brief(what, 200)}.") from None
    finally:
        loader.dispose()
    if node is None or value is None:
        raise SpecError(f"{name}:1: is empty.", advice="`penstock init` writes an example.")
    if found:
        raise _error(name, node, found)
    try:
        spec = Spec.model_validate(value)
    except ValidationError as error:
        wrong = list(said(error))
        raise _error(name, node, [*wrong, *_between(value, [path for path, _ in wrong])]) from None
    if found := problems(spec):
        raise _error(name, node, found)
    return spec


def _between(value: Any, wrong: Collection[Path_]) -> list[tuple[Path_, str]]:
    """What is wrong between the parts of a spec of which some are wrong themselves, so that both are told at
    once. Of the wrong ones only the names are known; where not even those are, nothing is said."""
    if not isinstance(value, dict) or any(len(path) < 2 and path[:1] and path[0] in _NAMED for path in wrong):
        return []
    broken = {path[:2] for path in wrong if path and path[0] in _NAMED}
    rest = {name: part for name, part in value.items() if (name,) not in {path[:1] for path in wrong}}
    for each in {str(section) for section, _ in broken}:
        rest[each] = {name: entry for name, entry in value[each].items() if (each, str(name)) not in broken}
    try:
        spec = Spec.model_validate(rest)
    except ValidationError:
        return []
    parts: dict[str, dict[str, Any]] = {section: dict(getattr(spec, section)) for section in _NAMED}
    for section, name in broken:
        parts[str(section)][str(name)] = _known(str(section), value[section].get(name))
    found = problems(spec.model_copy(update=parts))
    return [(path, what) for path, what in found if path[:2] not in broken]


def _known(section: str, entry: Any) -> BaseModel:
    """A part of which no more is known than that it is there, and what others may refer to in it."""
    if section != "upstreams":
        return _NAMED[section].model_construct(pool="", targets=())
    served = entry.get("models") if isinstance(entry, dict) else None
    names = [str(name) for name in served] if isinstance(served, dict) else []
    return Upstream.model_construct(url="", models={name: UpstreamModel() for name in names})


def _error(name: str, node: yaml.Node, found: list[tuple[Path_, str]]) -> SpecError:
    lines = []
    for path, what in found[:_MOST_ERRORS]:
        where = ".".join(map(_plain, path))
        lines.append((_line(node, path), f"{brief(where, 200)}: {what}" if where else what))
    lines.sort()
    told = [f"{name}:{line}: {what}" for line, what in lines]
    if len(found) > _MOST_ERRORS:
        told.append(f"{name}: and {len(found) - _MOST_ERRORS} more.")
    return SpecError("\n".join(told))


def _plain(part: str | int) -> str:
    """Part of a path, as it may stand in a line of a terminal."""
    text = str(part)
    return text if text.isprintable() else ascii(text)[1:-1]


def said(error: ValidationError, shape: type[BaseModel] = Spec) -> Iterator[tuple[Path_, str]]:
    """pydantic's errors of a `shape`, in our words: where, and what."""
    for number, each in enumerate(error.errors(include_url=False)):
        path = tuple(part for part in each["loc"] if part != "[key]")
        kind, message = each["type"], each["msg"]
        if kind == "extra_forbidden":
            known = _fields(shape, path[:-1]) if number < _MOST_ERRORS else []
            yield path, f"unknown key. {meant(str(path[-1]), known, 0.5)}".rstrip()
        elif kind == "missing":
            yield path, "is required."
        else:
            what = message.removeprefix("Value error, ")
            given = "" if kind == "value_error" else f", got {quote(each['input'])}"
            yield path, f"{what[:1].lower()}{what[1:]}{given}."


def _fields(shape: Any, path: Path_) -> list[str]:
    """Keys that the part at `path` of a shape may have."""
    for step in path:
        shape = _inside(shape, step)
    return list(shape.model_fields) if isinstance(shape, type) and issubclass(shape, BaseModel) else []


def _inside(shape: Any, step: str | int) -> Any:
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        field = shape.model_fields.get(str(step))
        return None if field is None else _bare(field.annotation)
    arguments = get_args(shape)
    return _bare(arguments[1] if get_origin(shape) is dict else arguments[0]) if arguments else None


def _bare(shape: Any) -> Any:
    """A type without its Annotated and its `| None`."""
    while True:
        if get_origin(shape) is Annotated:
            shape = get_args(shape)[0]
        elif get_origin(shape) in (Union, UnionType):
            shape = next(each for each in get_args(shape) if each is not type(None))
        else:
            return shape


def _line(node: yaml.Node, path: Path_) -> int:
    """Line (from 1) of the entry at `path`, or of the innermost part of it that is there."""
    line: int = node.start_mark.line + 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(step):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _unprintable(node: yaml.Node, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Texts with control characters: no path, URL, header or argument of a command may have one."""
    if isinstance(node, yaml.ScalarNode):
        if control := _CONTROL.search(node.value):
            yield path, f"has the control character U+{ord(control[0]):04X}."
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _unprintable(key, (*path, str(key.value)))
            yield from _unprintable(value, (*path, str(key.value)))
    else:
        for index, value in enumerate(node.value):
            yield from _unprintable(value, (*path, index))


def _duplicates(node: yaml.Node, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """Keys that stand twice in a mapping: YAML forbids them, and PyYAML takes the last."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                yield (*path, name), f"stands twice, again in line {key.start_mark.line + 1}."
            seen.add(name)
            yield from _duplicates(value, (*path, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _duplicates(value, (*path, index))
