"""Qwen3-Coder and Qwen3.5: tags for the function and each parameter, and values without quotes.

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from penstock.grammar.tagged import alternatives

from .forms import Form
from .tools import ToolParser, Tried, dump

_HEAD = re.compile(r"(?:<tool_call>\s*)?<function=(?P<name>[A-Za-z0-9_.-]+)>\s*")
_PARAMETER = re.compile(r"<parameter=(?P<name>[^>\n]+)>")
_LONGEST_HEAD = 512
_END, _FUNCTION_END, _CALL_END = "</parameter>", "</function>", "</tool_call>"


class Qwen3Coder(ToolParser):
    """Values are read as the tool's schema says; what does not fit it is a string."""

    marks = ("<tool_call>", "<function=")
    form = Form(
        begin="<tool_call>\n<function=NAME>\n",
        end="</function>\n</tool_call>",
        separator="\n",
        trigger="<tool_call>",
        style="qwen_xml",
    )
    others = (_CALL_END, _FUNCTION_END, "<parameter=", _END)

    def _call(self) -> Tried:
        while not (head := _HEAD.match(self._buffer)):
            if len(self._buffer) > _LONGEST_HEAD or not (yield from self._more()):
                return False
        at = yield from self._skip(head.end())
        tool = self._tools.get(head["name"])
        arguments: dict[str, Any] = {}
        while not (yield from self._starts_with(at, (_FUNCTION_END,))):
            while not (parameter := _PARAMETER.match(self._buffer, at)):
                if len(self._buffer) - at > _LONGEST_HEAD or not (yield from self._more()):
                    return False
            end = at = parameter.end()
            while True:  # the end of the value is one that a parameter, or the end of all, follows
                if (end := (yield from self._find(_END, end))) < 0:
                    return False
                behind = yield from self._skip(end + len(_END))
                if (yield from self._starts_with(behind, ("<parameter=", _FUNCTION_END))):
                    break
                end += len(_END)
            value = self._buffer[at:end]
            schema = {} if tool is None else tool.parameters
            arguments[parameter["name"].strip()] = read_value(
                value.removeprefix("\n").removesuffix("\n"), schema, parameter["name"].strip()
            )
            at = behind
        end = at + len(_FUNCTION_END)
        end = yield from self._behind(end, (_CALL_END,))
        self._whole_call(head["name"], dump(arguments), taken=end)
        return True


def read_value(text: str, parameters: Mapping[str, Any], name: str) -> Any:
    """A value as the schema of the parameters has it."""
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    kinds = types(schema, parameters) if isinstance(schema, Mapping) else set()
    if not kinds:  # nobody says: what is an object or a list by its looks, and else a text
        kinds = {"object", "array"} if text.strip().startswith(("{", "[")) else {"string"}
    if "null" in kinds and text.strip().lower() in ("null", "none"):
        return None
    if "boolean" in kinds and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if kinds & {"integer", "number", "object", "array"}:
        try:
            value = json.loads(text, strict=False, parse_constant=_no_constant)
            dump(value)  # no number is infinite
        except (ValueError, RecursionError):
            return text
        if any(_is(value, kind) for kind in kinds):
            return value
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    known = {"integer": int, "number": int | float, "object": dict, "array": list}
    return kind in known and isinstance(value, known[kind])


def types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> set[str]:
    """The types that a schema of an argument allows, as far as it says so in so many words."""
    names = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        type(None): "null",
        list: "array",
    }
    found: set[str] = set()
    for each in alternatives(schema, root):
        kind = each.get("type")
        if isinstance(kind, str):
            found.add(kind)
        elif "const" in each or "enum" in each:
            values = each.get("enum", [each.get("const")])
            found |= {names.get(type(value), "object") for value in values}
        for inner in each.get("allOf") or ():
            if isinstance(inner, Mapping):
                found |= types(inner, root)
    return found
