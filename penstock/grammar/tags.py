"""Structural tags: free text with structured parts in it, such as tool calls. Shapes are those that vLLM
takes.

    {"structures": [{"begin", "schema", "end"}], "triggers": […]}      the older shape: text, and behind a
                                                                        trigger one of the structures
    {"format": F}, or F alone                                           the newer one, where F is one of

    {"type": "const_string", "value"}               {"type": "sequence" | "or", "elements": [F]}
    {"type": "json_schema", "json_schema"}          {"type": "optional" | "star" | "plus", "content": F}
    {"type": "regex", "pattern"}                    {"type": "repeat", "content": F, "min", "max"}
    {"type": "grammar", "grammar"}                  {"type": "tag", "begin", "content": F, "end": text(s)}
    {"type": "any_text", "excludes": texts}
    {"type": "triggered_tags", "triggers", "tags": [tag], "excludes", "at_least_one", "stop_after_first"}
    {"type": "tags_with_separator", "tags": [tag], "separator", "at_least_one", "stop_after_first"}

This module checks shapes and makes all of it the newer one; `source` writes it for the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote

from .schema import check_depth, examine

MOST_PARTS = 2_000
"""Formats in a structural tag."""

Format = dict[str, Any]


def examine_tags(value: Any, strict: bool | None, field: str) -> tuple[Format, list[str]]:
    """(the outermost format, names of keywords of schemas that are skipped).

    Raises InvalidRequest or UnsupportedParameter, naming the place.
    """
    check_depth(value, field)
    if not isinstance(value, dict):
        raise _wrong(field, "an object", value)
    if "structures" in value or "triggers" in value:
        value = _older(value, field)
    elif "format" in value:
        value, field = value["format"], f"{field}.format"
    reader = _Reader(strict)
    return reader.read(value, field), reader.skipped


def _older(value: Mapping[str, Any], field: str) -> Format:
    tags = []
    structures = value.get("structures")
    if not isinstance(structures, list):
        raise _wrong(f"{field}.structures", "a list", structures)
    for place, each in enumerate(structures):
        where = f"{field}.structures.{place}"
        if not isinstance(each, dict):
            raise _wrong(where, "an object", each)
        tags.append(
            {
                "type": "tag",
                "begin": each.get("begin"),
                "content": {"type": "json_schema", "json_schema": each.get("schema", {})},
                "end": each.get("end"),
            }
        )
    return {"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags}


class _Reader:
    def __init__(self, strict: bool | None) -> None:
        self.skipped: list[str] = []
        self._strict = strict
        self._count = 0

    def read(self, value: Any, field: str) -> Format:
        """A format, checked."""
        self._count += 1
        if self._count > MOST_PARTS:
            raise InvalidRequest(f"{field}: the structural tag has over {MOST_PARTS} parts.", param=field)
        if not isinstance(value, dict):
            raise _wrong(field, "an object", value)
        kind = value.get("type")
        reading = _READERS.get(kind) if isinstance(kind, str) else None
        if reading is None:
            raise UnsupportedParameter(
                f"{field}.type must be one of {', '.join(_READERS)}, got {quote(kind)}.",
                param=f"{field}.type",
            )
        return {"type": kind, **reading(self, value, field)}

    def schema(self, value: Format, field: str) -> Format:
        if value.get("style", "json") != "json":
            raise UnsupportedParameter(
                f"{field}.style must be json, got {quote(value['style'])}.", param=f"{field}.style"
            )
        where = f"{field}.json_schema"
        schema = value.get("json_schema")
        schema, skipped = examine({} if schema is None else schema, self._strict, where)
        self.skipped += skipped
        return {"json_schema": schema}

    def elements(self, value: Format, field: str) -> Format:
        found = _listed(value, "elements", field)
        return {"elements": [self.read(each, f"{field}.elements.{i}") for i, each in enumerate(found)]}

    def content(self, value: Format, field: str) -> Format:
        return {"content": self.read(value.get("content"), f"{field}.content")}

    def repeat(self, value: Format, field: str) -> Format:
        low, high = value.get("min"), value.get("max")
        for name, bound in (("min", low), ("max", high)):
            if not isinstance(bound, int) or isinstance(bound, bool) or not 0 <= bound <= 10_000:
                raise _wrong(f"{field}.{name}", "a whole number in [0, 10000]", bound)
        if low > high:  # type: ignore[operator]
            raise InvalidRequest(f"{field}.min={low} is over max={high}.", param=f"{field}.min")
        return {"min": low, "max": high, **self.content(value, field)}

    def tag(self, value: Format, field: str) -> Format:
        ends = value.get("end")
        ends = ends if isinstance(ends, list) else [ends]
        if not ends or not all(isinstance(each, str) for each in ends):
            raise _wrong(f"{field}.end", "a text, or texts", value.get("end"))
        return {"begin": _text(value, "begin", field), "end": ends, **self.content(value, field)}

    def tags(self, value: Format, field: str) -> Format:
        """All tags of a choice between them."""
        tags = []
        for place, each in enumerate(_listed(value, "tags", field)):
            where = f"{field}.tags.{place}"
            if not isinstance(each, dict):
                raise _wrong(where, "an object", each)
            tags.append(self.read({"type": "tag", **each}, where))
        flags = {}
        for name in ("at_least_one", "stop_after_first"):
            flags[name] = value.get(name) or False
            if not isinstance(flags[name], bool):
                raise _wrong(f"{field}.{name}", "true or false", flags[name])
        return {"tags": tags, **flags}

    def triggered(self, value: Format, field: str) -> Format:
        triggers = _listed(value, "triggers", field)
        if not all(isinstance(each, str) and each for each in triggers):
            raise _wrong(f"{field}.triggers", "texts that are not empty", triggers)
        read = self.tags(value, field)
        for place, tag in enumerate(read["tags"]):
            if not any(tag["begin"].startswith(trigger) for trigger in triggers):
                raise InvalidRequest(
                    f"{field}.tags.{place}.begin {quote(tag['begin'])} begins with none of the triggers "
                    f"{quote(triggers)}.",
                    param=f"{field}.tags.{place}.begin",
                )
        return {"triggers": triggers, **read, **_excludes(value, field)}

    def separated(self, value: Format, field: str) -> Format:
        return {"separator": _text(value, "separator", field), **self.tags(value, field)}


def _any_text(_: _Reader, value: Format, field: str) -> Format:
    _no_more(value, field, "max_tokens", "max_chars")
    return _excludes(value, field)


def _excludes(value: Format, field: str) -> Format:
    """Texts that do not occur in free text."""
    texts = value.get("excludes") or []
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise _wrong(f"{field}.excludes", "texts that are not empty", texts)
    return {"excludes": texts} if texts else {}


_READERS: Mapping[str, Callable[[_Reader, Format, str], Format]] = {
    "const_string": lambda _, value, field: {"value": _text(value, "value", field)},
    "json_schema": _Reader.schema,
    "regex": lambda _, value, field: {"pattern": _text(value, "pattern", field)},
    "grammar": lambda _, value, field: {"grammar": _text(value, "grammar", field)},
    "any_text": _any_text,
    "sequence": _Reader.elements,
    "or": _Reader.elements,
    "optional": _Reader.content,
    "star": _Reader.content,
    "plus": _Reader.content,
    "repeat": _Reader.repeat,
    "tag": _Reader.tag,
    "triggered_tags": _Reader.triggered,
    "tags_with_separator": _Reader.separated,
}


def _text(value: Format, name: str, field: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise _wrong(f"{field}.{name}", "a text", text)
    return text


def _listed(value: Format, name: str, field: str) -> list[Any]:
    found = value.get(name)
    if not isinstance(found, list) or not found:
        raise _wrong(f"{field}.{name}", "a list that is not empty", found)
    return found


def _no_more(value: Format, field: str, *names: str) -> None:
    for name in names:
        if value.get(name):
            raise UnsupportedParameter(
                f"{field}.{name} is not supported by this server (got {quote(value[name])}).",
                param=f"{field}.{name}",
                advice="Leave it out.",
            )


def _wrong(field: str, what: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{field} must be {what}, got {quote(value)}.", param=field)
