"""Arguments as Qwen3-Coder writes them, a tag for each: what stands for a JSON schema there.

    <parameter=city>
    Paris
    </parameter>

Texts have no quotes, everything else is JSON. It makes formats of structural tags out of schemas that were
checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Format = dict[str, Any]

_END = "\n</parameter>\n"


def tagged(schema: Mapping[str, Any]) -> Format:
    """Arguments in the order of the schema, each in a tag; those that are not required may be left out."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    elements: list[Format] = []
    for name, inner in properties.items():
        values = [_value(each, schema) for each in alternatives(inner, schema)]
        if _ANY in values:  # which is what the others are, too
            values = [_ANY]
        # one tag for each kind, and not one around all: where a text ends is known with its tag
        tags = [_tag(name, each) for each in values]
        tag = tags[0] if len(tags) == 1 else {"type": "or", "elements": tags}
        elements.append(tag if name in required else {"type": "optional", "content": tag})
    return {"type": "sequence", "elements": elements} if elements else {"type": "const_string", "value": ""}


def _tag(name: str, content: Format) -> Format:
    return {"type": "tag", "begin": f"<parameter={name}>\n", "content": content, "end": _END}


_ANY: Format = {"type": "any_text"}


def _value(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Format:
    """Of one kind: a text stands there without quotes, everything else as JSON."""
    if "const" in schema and isinstance(schema["const"], str):
        return {"type": "const_string", "value": schema["const"]}
    kind = schema.get("type")
    if kind == "string" or not schema.keys() & _SAYS_KIND:
        names = {"minLength": "min_chars", "maxLength": "max_chars"}
        return _ANY | {bound: schema[name] for name, bound in names.items() if schema.get(name) is not None}
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return {"type": "json_schema", "json_schema": {**schema, **shared}}


def not_held(schema: Mapping[str, Any]) -> str | None:
    """What of the schema no grammar enforces: its path in the schema, or None. A text without quotes is held
    to its length, and to nothing else."""
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
