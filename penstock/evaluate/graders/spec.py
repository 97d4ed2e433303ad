"""Graders as a set or a flag names them: `"exact"`, `{"type": "numeric", "relative": 0.01}`, `regex:^yes`.

Checked when they are read: a pattern compiles, a schema is a schema, and `expected` is what the grader can
compare with. What goes wrong is a ValueError, for the reader of the set to put a line number before it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from penstock.core.errors import brief, quote

from .values import check_schema, read_number

LONGEST_PATTERN = 20_000
"""Characters of a regular expression."""


class Grader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", omit_defaults=True):
    """What all have in common."""

    @property
    def outside(self) -> str:
        """What it calls that is not this package: "http", "python", "judge", or nothing."""
        return ""

    def check(self, expected: tuple[Any, ...]) -> None:
        """Raises ValueError where this cannot be graded."""


class _Text(Grader, frozen=True):
    def check(self, expected: tuple[Any, ...]) -> None:
        if not expected or not all(isinstance(text, str) for text in expected):
            raise ValueError(
                f"the grader {self.__struct_config__.tag} needs a text, or a list of texts, as expected"
            )


class Exact(_Text, frozen=True, tag="exact"):
    """One of the expected texts, character for character."""


class Normalised(_Text, frozen=True, tag="normalised"):
    """The same after case, punctuation, English articles and white space are taken out (SQuAD's rule)."""


class Includes(_Text, frozen=True, tag="includes"):
    """One of the expected texts stands somewhere in the answer."""

    normalised: bool = False


class Regex(Grader, frozen=True, tag="regex"):
    """A regular expression of Python's `re` is found in the answer: `pattern`, else one of the expected."""

    pattern: str | None = None
    ignore_case: bool = False
    full: bool = False
    """The whole answer, and not a part of it."""

    def patterns(self, expected: tuple[Any, ...]) -> tuple[str, ...]:
        """Those of which one must match."""
        return (self.pattern,) if self.pattern is not None else expected

    def check(self, expected: tuple[Any, ...]) -> None:
        patterns = self.patterns(expected)
        if not patterns:
            raise ValueError("the grader regex needs a pattern, or one as expected")
        for pattern in patterns:
            if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
                raise ValueError(f"a pattern is a text of {LONGEST_PATTERN:,} characters at most")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"the pattern {quote(pattern)} is none: {error or 'nested too deeply'}"
                ) from None


class JsonSchema(Grader, frozen=True, tag="json_schema"):
    """The answer is JSON, valid under `schema`; where something is expected, equal to one of it, too."""

    schema: dict[str, Any] | bool
    fenced: bool = False
    """A Markdown fence around the JSON may be there."""

    def check(self, expected: tuple[Any, ...]) -> None:
        check_schema(self.schema)


class Numeric(Grader, frozen=True, tag="numeric"):
    """A number of the answer is as far from an expected one as `absolute` or `relative` allow, at most."""

    absolute: float = 0.0
    relative: float = 0.0
    """Of the expected number."""
    pick: Literal["last", "first", "only"] = "last"
    """Which number of the answer counts; `only`: the answer must be nothing but a number."""

    def check(self, expected: tuple[Any, ...]) -> None:
        if not expected or any(read_number(value) is None for value in expected):
            raise ValueError("the grader numeric needs a number, or a list of numbers, as expected")
        if not (0 <= self.absolute < float("inf") and 0 <= self.relative < float("inf")):
            raise ValueError("the tolerances of the grader numeric are numbers from 0 on")


class Http(Grader, frozen=True, tag="http"):
    """A server of yours is sent the example and the answer, and says what it is worth."""

    url: str
    timeout: float = 30.0

    @property
    def outside(self) -> str:
        return "http"

    def check(self, expected: tuple[Any, ...]) -> None:
        if not re.fullmatch(r"https?://[^\s]+", self.url):
            raise ValueError(f"the grader http has the url {quote(self.url)}; write http://… or https://…")
        _check_timeout(self.timeout)


class Python(Grader, frozen=True, tag="python"):
    """A function of yours is given the example and the answer, and returns what it is worth."""

    function: str
    """`package.module:name`."""
    timeout: float = 30.0

    @property
    def outside(self) -> str:
        return "python"

    def check(self, expected: tuple[Any, ...]) -> None:
        if not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"the grader python has the function {quote(self.function)}; write module:name")
        _check_timeout(self.timeout)


class Judge(Grader, frozen=True, tag="judge"):
    """A model reads the question, what was expected and the answer, and grades it by a rubric."""

    rubric: str | None = None
    """What a good answer is; None takes that of --rubric, or the usual one."""
    scale: int = 1
    """The best grade; the worst is 0. With 1, the judge says right or wrong."""

    @property
    def outside(self) -> str:
        return "judge"

    def check(self, expected: tuple[Any, ...]) -> None:
        if not 1 <= self.scale <= 100:
            raise ValueError(f"the scale of the grader judge is {self.scale}; it goes from 1 to 100")


AnyGrader = Exact | Normalised | Includes | Regex | JsonSchema | Numeric | Http | Python | Judge

NAMES = {kind.__struct_config__.tag: kind for kind in get_args(AnyGrader)}
_ALIASES = {"normalized": "normalised", "json-schema": "json_schema", "number": "numeric"}


def read_grader(value: Any) -> AnyGrader:
    """From a set: a name, or an object with `type`. Raises ValueError."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError(f"a grader is a name or an object with its type: {', '.join(NAMES)}")
    kind = _ALIASES.get(value["type"], value["type"])
    if kind not in NAMES:
        raise ValueError(f"the grader {quote(value['type'])} is not known; choose from {', '.join(NAMES)}")
    try:
        grader: AnyGrader = msgspec.convert({**value, "type": kind}, AnyGrader)
        return grader
    except msgspec.ValidationError as error:
        raise ValueError(f"the grader {kind}: {brief(str(error), 200)}") from None


def read_flag(text: str) -> AnyGrader:
    """From a flag: a JSON object, a name, or a name with its one value: `regex:PATTERN`, `numeric:0.01`,
    `json_schema:FILE`, `python:module:function`, `judge:RUBRIC_FILE`, a URL. Raises ValueError."""
    if text.startswith("{"):
        try:
            return read_grader(json.loads(text))
        except RecursionError:
            raise ValueError("the grader is nested too deeply") from None
    if text.startswith(("http://", "https://")):
        return read_grader({"type": "http", "url": text})
    kind, _, value = text.partition(":")
    if not value:
        return read_grader(kind)
    kind = _ALIASES.get(kind, kind)
    if kind == "regex":
        return read_grader({"type": kind, "pattern": value})
    if kind == "numeric":
        try:
            return read_grader({"type": kind, "absolute": float(value)})
        except ValueError:
            raise ValueError(f"numeric:{value}: the tolerance is a number, such as 0.01") from None
    if kind == "json_schema":
        return read_grader({"type": kind, "schema": json.loads(_file(value))})
    if kind == "python":
        return read_grader({"type": kind, "function": value})
    if kind == "judge":
        return read_grader({"type": kind, "rubric": _file(value)})
    raise ValueError(f"the grader {quote(text)} is not known; choose from {', '.join(NAMES)}")


def _file(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            content = file.read((1 << 20) + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    if len(content) > 1 << 20:
        raise ValueError(f"{name} has more than a megabyte")
    return content.decode("utf-8")  # UnicodeDecodeError is a ValueError


def _check_timeout(timeout: float) -> None:
    if not 0 < timeout <= 3600:
        raise ValueError(f"a grader's timeout is {timeout:g} s; it goes up to 3600")
