"""How a family writes calls, as a structural tag: what a grammar holds a model to that has to call a tool.

    required    [before] call [separator call]… [after]
    auto        text, and behind the trigger the same

The shapes are those of vLLM's structural tags (`penstock.grammar.tags`); who compiles them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from penstock.grammar import tagged

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
    """What text begins with, where it has a mark of its own: then an answer is text, or calls."""
    said_json: str = ""
    """The same, where the text is JSON."""
    aside: str = ""
    """What a text before calls begins with there; the separator ends it."""
    sure: bool = True
    """Nothing but the trigger is read as the beginning of a call."""
    style: Literal["json", "qwen_xml"] = "json"
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
    called = calls(form, tools, single)
    if form.aside:
        aside = {"type": "tag", "begin": form.aside, "content": {"type": "any_text"}, "end": form.separator}
        called = {"type": "sequence", "elements": [{"type": "optional", "content": aside}, called]}
    if form.said:
        begin = form.said_json if text["type"] == "json_schema" else form.said
        text = {"type": "tag", "begin": begin, "content": text, "end": ""}
    return {"type": "or", "elements": [called, text]}


def _tags(form: Form, tools: Mapping[str, Mapping[str, Any]]) -> list[Format]:
    return [
        {
            "type": "tag",
            "begin": form.begin.replace("NAME", name),
            "content": {"type": "json_schema", "json_schema": schema, "style": form.style},
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


def says_more(parameters: Mapping[str, Any]) -> bool:
    """Whether a schema allows properties that it does not name."""
    return bool(_OTHER_PROPERTIES & parameters.keys()) and parameters.get("additionalProperties") is not False


def arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments: an object, with nothing that it does not name. As in OpenAI's API, a
    tool without parameters takes none."""
    if _OTHER_PROPERTIES & parameters.keys():
        return {**parameters, "type": "object"}
    return {"properties": {}, **parameters, "type": "object", "additionalProperties": False}


def not_held(form: Form, schema: Mapping[str, Any]) -> str | None:
    """What of the schema of a tool's arguments no grammar of this form enforces: its path in the schema, or
    None."""
    return None if form.style == "json" else tagged.not_held(schema)
