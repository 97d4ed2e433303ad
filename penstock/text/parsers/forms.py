"""How a family writes calls, as a structural tag: what a grammar holds a model to that has to call a tool.

    required    [before] call [separator call]… [after]
    auto        text, and behind the trigger the same

The shapes are those of vLLM's structural tags (`penstock.grammar.tags`); who compiles them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Format = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """One family's. In `begin`, NAME stands for the tool's name."""

    begin: str
    end: str
    separator: str = ""
    before: str = ""
    """Stands before the first call; with `after` behind the last one."""
    after: str = ""
    trigger: str = ""
    """What tells a call from text."""
    said: str = ""
    """What text begins with, where it has a mark of its own: then an answer is text or calls, not both."""
    said_json: str = ""
    """The same, where the text is JSON."""
    sure: bool = True
    """Nothing but the trigger is read as the beginning of a call."""
    values: Literal["json", "tags"] = "json"
    """How arguments are written: a JSON object, or a tag for each."""


def calls(form: Form, tools: Mapping[str, Mapping[str, Any]], single: bool) -> Format:
    """One call or more, and nothing else. tools: schemas of arguments by name."""
    found: Format = {
        "type": "tags_with_separator",
        "tags": _tags(form, tools),
        "separator": form.separator,
        "at_least_one": True,
        "stop_after_first": single,
    }
    if not form.before:
        return found
    return {"type": "tag", "begin": form.before, "content": found, "end": form.after}


def text_and_calls(form: Form, tools: Mapping[str, Mapping[str, Any]], single: bool) -> Format:
    """Any text, and calls in it."""
    if form.said:
        return either(form, tools, single, {"type": "any_text"})
    tags = [calls(form, tools, single)] if form.before else _tags(form, tools)
    return {
        "type": "triggered_tags",
        "triggers": [form.trigger],
        "tags": tags,
        "stop_after_first": single,
    }


def either(form: Form, tools: Mapping[str, Mapping[str, Any]], single: bool, text: Format) -> Format:
    """Calls, or text of this format."""
    if form.said:
        begin = form.said_json if text["type"] == "json_schema" else form.said
        text = {"type": "tag", "begin": begin, "content": text, "end": ""}
    return {"type": "or", "elements": [calls(form, tools, single), text]}


def _tags(form: Form, tools: Mapping[str, Mapping[str, Any]]) -> list[Format]:
    return [
        {
            "type": "tag",
            "begin": form.begin.replace("NAME", name),
            "content": _tagged(schema)
            if form.values == "tags"
            else {"type": "json_schema", "json_schema": schema},
            "end": form.end,
        }
        for name, schema in tools.items()
    ]


#: With one of these, a schema says something of properties that it does not name.
_OTHER_PROPERTIES = frozenset(
    {
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "if",
        "oneOf",
        "patternProperties",
        "unevaluatedProperties",
    }
)


def arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments: an object, with nothing that it does not name. As in OpenAI's API, a
    tool without parameters takes none."""
    if _OTHER_PROPERTIES & parameters.keys():
        return {**parameters, "type": "object"}
    return {"properties": {}, **parameters, "type": "object", "additionalProperties": False}


_PARAMETER_END = "\n</parameter>\n"


def _tagged(schema: Mapping[str, Any]) -> Format:
    """Arguments in the order of the schema, each in a tag; those that are not required may be left out."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    elements: list[Format] = []
    for name, inner in properties.items():
        values = [_value(each, schema) for each in alternatives(inner, schema)]
        tag: Format = {
            "type": "tag",
            "begin": f"<parameter={name}>\n",
            "content": values[0] if len(values) == 1 else {"type": "or", "elements": values},
            "end": _PARAMETER_END,
        }
        elements.append(tag if name in required else {"type": "optional", "content": tag})
    return {"type": "sequence", "elements": elements} if elements else {"type": "const_string", "value": ""}


def _value(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Format:
    """Of one kind: a text stands there without quotes, everything else as JSON."""
    if "const" in schema and isinstance(schema["const"], str):
        return {"type": "const_string", "value": schema["const"]}
    kind = schema.get("type")
    if kind == "string" or not schema.keys() & _SAYS_KIND:
        low, high = schema.get("minLength"), schema.get("maxLength")
        if low is None and high is None:
            return {"type": "regex", "pattern": without(_PARAMETER_END.strip())}
        return {"type": "regex", "pattern": f"[^<]{{{low or 0},{'' if high is None else high}}}"}
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return {"type": "json_schema", "json_schema": {**schema, **shared}}


def not_held(form: Form, schema: Mapping[str, Any]) -> str | None:
    """What of the schema of a tool's arguments no grammar of this form enforces: its path in the schema, or
    None. A text without quotes is held to its length, and to nothing else."""
    if form.values == "tags":
        for name, inner in (schema.get("properties") or {}).items():
            for each in alternatives(inner, schema):
                for keyword in ("pattern", "format", "allOf"):
                    if each.get("type") == "string" and keyword in each:
                        return f"properties.{name}.{keyword}"
    return None


_SAYS_KIND = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "items"})
_MOST_ALTERNATIVES = 1000


def alternatives(schema: Any, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kinds of values that a schema allows, one schema for each; texts of an enum one by one."""
    found: list[Mapping[str, Any]] = []
    left: list[tuple[Any, int]] = [(schema, 0)]
    while left:
        each, depth = left.pop(0)
        if not isinstance(each, Mapping) or depth > _MOST_HOPS or len(found) >= _MOST_ALTERNATIVES:
            found.append(each if isinstance(each, Mapping) else {})
            continue
        kind, values = each.get("type"), each.get("enum")
        several = each.get("anyOf") or each.get("oneOf")
        same = each.get("allOf")
        inner: list[Any]
        if "$ref" in each:
            inner = [_referred(each["$ref"], root)]
        elif isinstance(several, list) and not each.keys() & {"properties", "enum"}:
            inner = [
                one if not kind or not isinstance(one, Mapping) else {"type": kind, **one} for one in several
            ]
        elif isinstance(same, list) and len(same) == 1 and not each.keys() & {"type", "properties", "enum"}:
            inner = list(same)
        elif isinstance(values, list):
            found += [{"const": value} for value in values if isinstance(value, str)]
            if others := [value for value in values if not isinstance(value, str)]:
                found.append({"enum": others})
            continue
        elif isinstance(kind, list):
            inner = [{**each, "type": one} for one in kind]
        else:
            found.append(each)
            continue
        left[:0] = [(one, depth + 1) for one in inner]
    return found or [{}]


_MOST_HOPS = 32


def _referred(reference: object, root: Mapping[str, Any]) -> Any:
    """What a $ref within the schema points at; None where it does not."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    at: Any = root
    for part in filter(None, reference[1:].split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        at = at.get(name) if isinstance(at, Mapping) else None
    return at


def without(text: str) -> str:
    """A regular expression of what does not have `text` in it, whose first character occurs in it once."""
    first, starts = text[0], [text[:size] for size in range(1, len(text))]
    beginnings = "|".join(map(_literal, starts))
    broken_off = "|".join(
        f"{_literal(start)}[^{_literal(first)}{_literal(text[size])}]"
        for size, start in enumerate(starts, start=1)
    )
    return f"(?:[^{_literal(first)}]|(?:{beginnings})*(?:{broken_off}))*"


def _literal(text: str) -> str:
    return "".join(f"\\{character}" if character in r".^$*+?{}[]\|()/-" else character for character in text)
