"""What verifiers hold an answer against: patterns that cannot take for ever, and JSON Schemas without a
network.

The texts are a model's, and so anybody's: a search has a time limit, and only so much of a text is looked at.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

MOST_SEARCHED = 256 * 1024
"""Characters of a text that patterns and schemas are tried on."""
_SECONDS = 0.2
"""Of a search, in processor time."""
_EVERYWHERE = re.compile(r"#(/.*)?", re.DOTALL)


class TooMuch(Exception):
    """A text is too long, or a search of it has taken too long."""


class Pattern:
    """A regular expression, with the syntax of the package `regex`. Raises ValueError where it is none."""

    def __init__(self, text: str) -> None:
        import regex

        try:
            self._compiled = regex.compile(text)
        except regex.error as error:
            raise ValueError(f"is no regular expression: {error}") from None

    def found(self, text: str) -> bool:
        """Whether it is somewhere in a text. Raises TooMuch."""
        if len(text) > MOST_SEARCHED:
            raise TooMuch
        try:
            return self._compiled.search(text, timeout=_SECONDS) is not None
        except TimeoutError:
            raise TooMuch from None


class Schema:
    """A JSON Schema, of the draft that its `$schema` names, else 2020-12. Raises ValueError where it is none,
    or has what is not followed here."""

    def __init__(self, schema: dict[str, Any]) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for

        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            raise ValueError(
                f"is no JSON Schema: {where + ': ' if where else ''}{error.message[:200]}"
            ) from None
        for name, value in _keywords(schema):
            if name == "patternProperties":
                raise ValueError("patternProperties is not supported here")
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                _check_reference(schema, value)
            if name == "pattern" and isinstance(value, str):
                Pattern(value)
        self._validator = _bounded(kind)(schema)

    def problem(self, text: str) -> str | None:
        """Why a text does not fit, in words of the schema and none of the text; None if it does. Raises
        TooMuch."""
        if len(text) > MOST_SEARCHED:
            raise TooMuch
        try:
            value = msgspec.json.decode(text)
        except (msgspec.MsgspecError, RecursionError):
            return "no JSON"
        error = next(self._validator.iter_errors(value), None)
        if error is None:
            return None
        return "does not fit " + "/".join(map(str, error.absolute_schema_path))[:200]


@functools.cache
def _bounded(kind: Any) -> Any:
    """A validator whose patterns have a time limit."""
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend

    compiled = functools.lru_cache(256)(Pattern)

    def pattern(validator: Any, text: str, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "string") and not compiled(text).found(instance):
            yield ValidationError("does not match")

    return extend(kind, {"pattern": pattern})


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Everything that stands in a schema under a name; more than its keywords, and none is missing."""
    left = [schema]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left += each
        elif isinstance(each, dict):
            yield from each.items()
            left += each.values()


def _check_reference(schema: Any, reference: str) -> None:
    """Raises ValueError for one that leads outside of the schema, or nowhere in it."""
    if not reference.startswith("#"):
        raise ValueError(
            f"$ref {json.dumps(reference[:100])} leads out of the schema; copy what it names into $defs"
        )
    if not _EVERYWHERE.fullmatch(reference):  # the name of an anchor
        return
    found = schema
    for step in reference[2:].split("/") if len(reference) > 1 else ():
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, dict) and step in found:
            found = found[step]
        else:
            raise ValueError(f"$ref {json.dumps(reference[:100])} leads nowhere")
