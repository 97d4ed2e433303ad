"""Structural tags: free text with structured parts in it, such as tool calls. Shapes are those that vLLM
takes.

    {"structures": [{"begin", "schema", "end"}], "triggers": […]}      the older shape: text, and behind a
                                                                        trigger one of the structures
    {"format": F}, or F alone                                           the newer one, where F is one of

    {"type": "const_string", "value"}               {"type": "sequence" | "or", "elements": [F]}
    {"type": "json_schema", "json_schema", "style"} {"type": "optional" | "star" | "plus", "content": F}
    {"type": "qwen_xml_parameter", "json_schema"}   an older name of style qwen_xml
    {"type": "regex", "pattern"}                    {"type": "repeat", "content": F, "min", "max"}
    {"type": "grammar", "grammar"}                  {"type": "tag", "begin", "content": F, "end": text(s)}
    {"type": "any_text", "excludes": texts, "max_tokens", "max_chars"}
    {"type": "triggered_tags", "triggers", "tags": [tag], "excludes", "at_least_one", "stop_after_first"}
    {"type": "tags_with_separator", "tags": [tag], "separator", "at_least_one", "stop_after_first"}

This module checks shapes and makes all of it the newer one; `source` writes it for the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote

from .schema import check_depth, examine
from .tagged import not_held, tagged

MOST_PARTS = 2_000
"""Formats in a structural tag."""
_MOST_TIMES = 10_000
_MOST_CHARACTERS = 100_000
"""Of free text, and tokens."""
_STYLES = ("json", "qwen_xml")
"""How values of a schema are written: as JSON, or in a tag for each property."""

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
        return {"type": kind, **reading(self, value, field)}  # qwen_xml says what it became

    def schema(self, value: Format, field: str) -> Format:
        style = value.get("style", "json")
        if style not in _STYLES:
            raise UnsupportedParameter(
                f"{field}.style must be one of {', '.join(_STYLES)}, got {quote(style)}.",
                param=f"{field}.style",
            )
        _no_more(value, field, "any_order")
        where = f"{field}.json_schema"
        schema = value.get("json_schema")
        schema, skipped = examine({} if schema is None else schema, self._strict, where)
        self.skipped += skipped
        return {"json_schema": schema} if style == "json" else self._tagged(schema, where)

    def _tagged(self, schema: Any, where: str) -> Format:
        """A tag for each property, in place of the schema."""
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise InvalidRequest(f"{where} must be of an object, where style is qwen_xml.", param=where)
        loose = not_held(schema)
        if loose and self._strict is not False:
            raise UnsupportedParameter(
                f"{where}.{loose} cannot be enforced: texts have no quotes there.", param=f"{where}.{loose}"
            )
        return self.read(tagged(schema), where)

    def elements(self, value: Format, field: str) -> Format:
        found = _listed(value, "elements", field)
        return {"elements": [self.read(each, f"{field}.elements.{i}") for i, each in enumerate(found)]}

    def content(self, value: Format, field: str) -> Format:
        return {"content": self.read(value.get("content"), f"{field}.content")}

    def repeat(self, value: Format, field: str) -> Format:
        low, high = _whole(value.get("min"), f"{field}.min", _MOST_TIMES), value.get("max")
        if high == -1 and not isinstance(high, float):  # as often as it likes
            return {"min": low, "max": None, **self.content(value, field)}
        if low > _whole(high, f"{field}.max", _MOST_TIMES):
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
    bounds = {}
    for name in ("max_tokens", "max_chars", "min_chars"):  # the last one is our own
        if (bound := value.get(name)) is not None:
            bounds[name] = _whole(bound, f"{field}.{name}", _MOST_CHARACTERS)
    return {**_excludes(value, field), **bounds}


def _whole(value: Any, field: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise _wrong(field, f"a whole number in [0, {most}]", value)
    return value


def _excludes(value: Format, field: str) -> Format:
    """Texts that do not occur in free text."""
    texts = value.get("excludes") or []
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise _wrong(f"{field}.excludes", "texts that are not empty", texts)
    return {"excludes": texts} if texts else {}


_READERS: Mapping[str, Callable[[_Reader, Format, str], Format]] = {
    "const_string": lambda _, value, field: {"value": _text(value, "value", field)},
    "json_schema": _Reader.schema,
    "qwen_xml_parameter": lambda reader, value, field: reader.schema({**value, "style": "qwen_xml"}, field),
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
