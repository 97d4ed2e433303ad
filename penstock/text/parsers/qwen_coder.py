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
from collections.abc import Collection, Generator, Mapping
from typing import Any

from penstock.grammar.tagged import alternatives

from .forms import Form, says_more
from .pythonic import literal
from .tools import Tool, ToolParser, Tried, dump

_HEAD = re.compile(r"(?:<tool_call>\s*)?<function=(?P<name>[A-Za-z0-9_.-]+)>\s*")
_LONGEST_NAME = 256
_PARAMETER = re.compile(rf"<parameter=(?P<name>[^>\n]{{1,{_LONGEST_NAME}}})>")
_LONGEST_HEAD = 512
_BEGIN, _END, _FUNCTION_END, _CALL_END = "<parameter=", "</parameter>", "</function>", "</tool_call>"
_TAG = re.compile(rf"{_PARAMETER.pattern}|</parameter>|<function=|</function>")
_ENDS = re.compile(r"</parameter>(?=\s*(?:(?P<function></function>)|<parameter=(?P<next>[^>\n]+)>))")
_GRAMMARS_END = "\n</parameter>\n"
_TYPES = {
    **dict.fromkeys(("int", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("float", "double", "num"), "number"),
    **dict.fromkeys(("dict", "map"), "object"),
    **dict.fromkeys(("list", "arr"), "array"),
    "bool": "boolean",
    "str": "string",
}
"""What is written for a type of JSON Schema, as vLLM reads it."""


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
    others = (_CALL_END, _FUNCTION_END, _BEGIN, _END)

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
            name, begin = parameter["name"].strip(), parameter.end()
            arguments.setdefault(name, None)
            found = yield from self._ending(begin, _others(tool, arguments))
            if found is None:
                return False
            end, at = found
            value = self._buffer[begin:end].removeprefix("\n").removesuffix("\n")
            arguments[name] = read_value(value, {} if tool is None else tool.parameters, name)
        end = at + len(_FUNCTION_END)
        end = yield from self._behind(end, (_CALL_END,))
        self._whole_call(head["name"], dump(arguments), taken=end)
        return True

    def _ending(
        self, begin: int, others: Collection[str] | None
    ) -> Generator[None, None, tuple[int, int] | None]:
        """(where the value that begins at a place of the buffer ends, where the next tag begins); None where
        the output is cut off in it.

        A value may have tags in it, as a file about calls has: its end is the first one that belongs to no
        beginning within it, and that another parameter or the end of the function follows. Models forget
        ends, too: where the function ends before one is found, the value ends as in vLLM at the next tag
        that can be one.

        others: parameters that may follow; None where nobody knows.
        """
        if self._trusted:
            end = yield from self._find(_GRAMMARS_END, begin)
            return None if end < 0 else (end, end + len(_GRAMMARS_END))
        parameters = functions = 0
        at = begin
        while True:
            tag = _TAG.search(self._buffer, at)
            if tag is None:
                at = max(at, len(self._buffer) - _LONGEST_NAME - len(_CALL_END))
                if not (yield from self._more()):
                    return None
                continue
            at = tag.end()
            if tag["name"] is not None:
                parameters += 1
            elif tag[0] == "<function=":
                functions += 1
            elif tag[0] == _END and parameters:
                parameters -= 1
            elif tag[0] == _END:
                behind = yield from self._skip(at)
                if (yield from self._goes_on(behind, others)):
                    return tag.start(), behind
            elif functions:
                functions -= 1
            else:
                behind = yield from self._skip(at)
                if behind == len(self._buffer) or (yield from self._starts_with(behind, (_CALL_END,))):
                    return self._forgotten(begin, tag.start(), others)

    def _goes_on(self, at: int, others: Collection[str] | None) -> Tried:
        """Whether a call goes on at a place of the buffer, behind a parameter."""
        mark = yield from self._starts_with(at, (_BEGIN, _FUNCTION_END))
        if mark != _BEGIN:
            return mark is not None
        while not (parameter := _PARAMETER.match(self._buffer, at)):
            rest = self._buffer[at:]
            if "\n" in rest or len(rest) > _LONGEST_NAME + len(_END) or not (yield from self._more()):
                return False
        return others is None or parameter["name"].strip() in others

    def _forgotten(self, begin: int, last: int, others: Collection[str] | None) -> tuple[int, int]:
        """The same for a value whose end is missing, in a function that ends at `last`."""
        text = self._buffer[:last]
        starts = [
            match
            for match in _PARAMETER.finditer(text, begin)
            if match["name"].strip() in (others or ()) and text[match.start() - 1] == "\n"
        ]
        start = starts[0].start() if starts else last
        for end in _ENDS.finditer(self._buffer, begin, last + len(_FUNCTION_END)):
            if end.start() > start:
                break
            if end["function"] or others is None or end["next"].strip() in others:
                behind = end.end()
                return end.start(), behind + len(text[behind:]) - len(text[behind:].lstrip())
        return start, start


def _others(tool: Tool | None, given: Collection[str]) -> Collection[str] | None:
    """Parameters of a tool that may still come; None where its schema does not say."""
    if tool is None or says_more(tool.parameters):
        return None
    properties = tool.parameters.get("properties")
    return [name for name in properties if name not in given] if isinstance(properties, Mapping) else None


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
        for read in (_json, _python, _quoted_python):
            try:
                value = read(text)
                dump(value)  # no number is infinite
            except (ValueError, RecursionError):
                continue
            if any(_is(value, kind) for kind in kinds):
                return value
    return text


def _json(text: str) -> Any:
    return json.loads(text, strict=False, parse_constant=_no_constant)


def _python(text: str) -> Any:
    """Objects and lists as Python writes them; its numbers are not read."""
    value = literal(text)
    return value if isinstance(value, dict | list) else _no_constant(text)


def _quoted_python(text: str) -> Any:
    """What a template writes that makes JSON of a text that Python made of a dictionary."""
    inner = _json(text)
    return _python(inner) if isinstance(inner, str) else _no_constant(text)


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
            found.add(_TYPES.get(kind, kind))
        elif "const" in each or "enum" in each:
            values = each.get("enum", [each.get("const")])
            found |= {names.get(type(value), "object") for value in values}
        for inner in each.get("allOf") or ():
            if isinstance(inner, Mapping):
                found |= types(inner, root)
    return found
