"""The set: JSON lines, one example each. All that is wrong with a file is said at once, with its lines.

    {"prompt": "What is 2 + 2?", "expected": "4"} {"id": "a7", "messages": [{"role": "user", "content": "…"}],
    "expected": ["4", "four"], "grader": "normalised"} {"request": {"prompt": "2 + 2 =", "max_tokens": 4},
    "expected": 4, "grader": {"type": "numeric"}} {"input": "2 + 2?", "ideal": "4"}
    as OpenAI's evals have it

`prompt` is a chat of one user message; `request` is a whole body, of a completion where it has a `prompt`. A
first line `{"defaults": {"grader": …, "request": {…}, "tags": […]}}` holds for all that do not say otherwise.
Two examples with the same request and the same grading would count one answer twice: the second is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import StartupError, brief, quote

from .graders.spec import AnyGrader, Exact, Grader, Normalised, read_grader

CHAT, COMPLETIONS = "/chat/completions", "/completions"
MOST_LINE = 16 << 20
"""Bytes of a line."""
MOST_EXAMPLES = 1_000_000
_TOLD = 30
"""Broken lines that are named; the others are counted."""

_OURS = frozenset({"id", "prompt", "messages", "request", "expected", "grader", "tags", "weight", "group"})
_THEIRS = {"input", "ideal"}
_DEFAULTS = frozenset({"grader", "request", "tags", "weight"})
_OVERRULED = frozenset({"model", "stream", "stream_options"})
"""What a request of a log has, and an evaluation decides."""


@dataclass(frozen=True, slots=True)
class Example:
    """One line."""

    id: str
    line: int
    path: str
    """CHAT or COMPLETIONS, behind the API's root."""
    request: Mapping[str, Any]
    """The body, without a model."""
    expected: tuple[Any, ...]
    grader: AnyGrader
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    group: str | None = None

    def about(self) -> dict[str, Any]:
        """What hooks are told of it."""
        return {
            "id": self.id,
            "request": dict(self.request),
            "expected": list(self.expected),
            "tags": list(self.tags),
        }


@dataclass(frozen=True, slots=True)
class Dataset:
    """All examples of a file."""

    name: str
    examples: tuple[Example, ...]
    sha256: str
    """Of the file."""
    skipped: tuple[str, ...] = ()
    """Broken lines, with what is wrong."""


def read_dataset(
    path: Path,
    *,
    grader: AnyGrader | None = None,
    skip_broken: bool = False,
    hooks_allowed: bool = False,
    limit: int | None = None,
) -> Dataset:
    """Read a set.

    Args:
        grader: of lines that name none, before the file's own default.
        skip_broken: leave broken lines out, instead of refusing the file.
        hooks_allowed: whether the file may name functions and servers that are called.
        limit: the first so many examples.

    Raises StartupError: no such file, no examples, or broken lines, all of which it names.
    """
    reader = _Reader(grader, hooks_allowed)
    digest = hashlib.sha256()
    problems: list[str] = []
    examples: list[Example] = []
    try:
        for number, line in _lines(path):
            digest.update(line)
            if not line.strip() or (limit is not None and len(examples) >= limit):
                continue
            try:
                if (example := reader.read(number, line)) is not None:
                    examples.append(example)
            except ValueError as error:
                problems.append(f"line {number}: {brief(str(error), 300)}")
    except OSError as error:
        raise StartupError(f"The set {path} cannot be read: {error.strerror or error}.") from error
    if problems and not skip_broken:
        told = "\n  ".join(problems[:_TOLD])
        more = f"\n  and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        lines = "line is" if len(problems) == 1 else "lines are"
        raise StartupError(
            f"{path}: {len(problems)} {lines} broken, and nothing was run:\n  {told}{more}\n",
            advice="Correct them, or leave them out with --skip-broken.",
        )
    if not examples:
        raise StartupError(
            f"{path} has no examples"
            + (f": all of its lines are broken, the first is {problems[0]}." if problems else "."),
            advice='A line is one example: {"prompt": "…", "expected": "…"}.',
        )
    return Dataset(path.name, tuple(examples), digest.hexdigest(), tuple(problems))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line; what is longer than MOST_LINE comes cut off."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            yield number, line
            while len(line) > MOST_LINE and not line.endswith(b"\n"):
                line = file.readline(MOST_LINE + 1)


class _Reader:
    """Line by line, with what the lines before have said."""

    def __init__(self, grader: AnyGrader | None, hooks_allowed: bool) -> None:
        self._flag = grader
        self._hooks_allowed = hooks_allowed
        self._defaults: Mapping[str, Any] = {}
        self._first = True
        self._ids: dict[str, int] = {}
        self._contents: dict[str, int] = {}

    def read(self, number: int, line: bytes) -> Example | None:
        """The example of a line; None for the defaults. Raises ValueError."""
        if len(line) > MOST_LINE:
            raise ValueError(f"it has more than {MOST_LINE >> 20} MiB")
        first, self._first = self._first, False
        try:
            value = msgspec.json.decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except msgspec.DecodeError as error:
            raise ValueError(f"it is not JSON: {error}") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8") from None
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        if "defaults" in value:
            if not first or set(value) != {"defaults"} or not isinstance(value["defaults"], dict):
                raise ValueError('{"defaults": {…}} stands alone, in the first line')
            _known(value["defaults"], _DEFAULTS, "defaults")
            self._defaults = value["defaults"]
            return None
        if len(self._ids) >= MOST_EXAMPLES:
            raise ValueError(f"a set has {MOST_EXAMPLES:,} examples at most")
        return self._example(number, value)

    def _example(self, number: int, value: dict[str, Any]) -> Example:
        _known(value, _OURS | _THEIRS, "an example")
        path, request = _request(value, self._defaults.get("request", {}))
        expected = _expected(value)
        grader = self._grader(value, expected)
        grader.check(expected)
        tags = value.get("tags", self._defaults.get("tags", []))
        if not isinstance(tags, list) or not all(
            isinstance(tag, str) and 0 < len(tag) <= 128 for tag in tags
        ):
            raise ValueError("tags are a list of texts of up to 128 characters")
        weight = value.get("weight", self._defaults.get("weight", 1.0))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e6:
            raise ValueError("weight is a number above 0, up to a million")
        group = value.get("group")
        if group is not None and not isinstance(group, str):
            raise ValueError("group is a text")
        name = value.get("id", f"line-{number}")
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
            raise ValueError("id is a text of up to 256 characters")
        if (before := self._ids.get(name)) is not None:
            raise ValueError(f"the id {quote(name)} is that of line {before}, too")
        content = canonical([path, request, expected, grader])
        if (before := self._contents.get(content)) is not None:
            raise ValueError(f"the same request with the same grading stands in line {before}")
        self._ids[name] = self._contents[content] = number
        return Example(
            name, number, path, request, expected, grader, tuple(dict.fromkeys(tags)), float(weight), group
        )

    def _grader(self, value: dict[str, Any], expected: tuple[Any, ...]) -> AnyGrader:
        named = value.get("grader", self._defaults.get("grader"))
        if named is None:
            if self._flag is not None:
                return self._flag
            if "ideal" in value:
                return Exact()
            if expected and all(isinstance(text, str) for text in expected):
                return Normalised()
            raise ValueError("it names no grader, and expects no text; write one, or give --grader")
        grader = read_grader(named)
        if grader.outside in ("python", "http") and not self._hooks_allowed:
            raise ValueError(
                f"the grader {grader.outside} calls something that the set names; --allow-hooks lets it"
            )
        return grader


def _request(value: dict[str, Any], defaults: Any) -> tuple[str, dict[str, Any]]:
    """(path, body)"""
    given = [name for name in ("prompt", "messages", "request", "input") if name in value]
    if len(given) != 1:
        raise ValueError(
            "it needs one of prompt, messages and request"
            + (f", and has {' and '.join(given)}" if given else "")
        )
    if not isinstance(defaults, dict):
        raise ValueError("the request of the defaults is no object")
    said = value[given[0]]
    if given[0] == "request":
        if not isinstance(said, dict):
            raise ValueError("request is no object")
        body = {**defaults, **said}
    elif isinstance(said, str) and given[0] != "messages":
        body = {**defaults, "messages": [{"role": "user", "content": said}]}
    elif given[0] == "prompt":
        raise ValueError("prompt is a text")
    else:
        body = {**defaults, "messages": said}
    body = {name: each for name, each in body.items() if name not in _OVERRULED}
    chat = "messages" in body
    if chat == ("prompt" in body):
        raise ValueError("a request has either messages or a prompt")
    if chat and not _are_messages(body["messages"]):
        raise ValueError("messages are a list of objects, each with its role")
    if not chat and (not isinstance(body["prompt"], str) or not body["prompt"]):
        raise ValueError("the prompt of a request is a text")
    if body.get("n", 1) != 1:
        raise ValueError("n is 1: an example has one answer")
    return (CHAT if chat else COMPLETIONS), body


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in value)
    )


def _expected(value: dict[str, Any]) -> tuple[Any, ...]:
    if "expected" in value and "ideal" in value:
        raise ValueError("expected and ideal are two names of the same")
    said = value.get("expected", value.get("ideal"))
    if said is None:
        return ()
    return tuple(said) if isinstance(said, list) else (said,)


def _known(value: Mapping[str, Any], names: frozenset[str] | set[str], what: str) -> None:
    if unknown := sorted(set(value) - names):
        raise ValueError(f"{what} has no {quote(unknown[0])}; it has {', '.join(sorted(names))}")


def canonical(value: Any) -> str:
    """A text that is the same for the same content. Members of the outermost objects are sorted; those inside
    keep their order, which chat templates show to the model (a tool's parameters)."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(canonical(each) for each in value) + "]"
    if isinstance(value, Grader):
        value = msgspec.to_builtins(value)
    if isinstance(value, Mapping):
        value = dict(sorted(value.items()))
    return msgspec.json.encode(value).decode()
