"""Chat messages as clients send them, checked and brought into the form that chat templates read.

Content parts of type text are joined with newlines, or kept as parts for templates that want them. Whatever
is not text is refused by name. Keys that OpenAI does not know, such as `prefix`, are the template's business.
It knows OpenAI's message shapes; it does not know the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.http.body import NotJson, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

#: Type of a text part → the key of its text.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
#: Handed to the template as they are; texts.
_KEPT = ("name", "tool_call_id", "reasoning", "reasoning_content")
#: Accepted when empty: dumps of OpenAI's own response objects carry them.
_EMPTY = ("annotations", "audio", "function_call", "refusal")
_OWN_RULES = ("role", "content", "tool_calls")


def normalise(messages: Sequence[Mapping[str, Any]], *, as_parts: bool = False) -> list[dict[str, Any]]:
    """Messages for the template. Raises InvalidRequest, naming the place (`messages[2].content`)."""
    if not messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    return [_message(message, f"messages[{i}]", as_parts) for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str, as_parts: bool) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}, got {quote(role)}.", param=f"{where}.role"
        )
    kept: dict[str, Any] = {"role": role}
    for name, value in message.items():
        if value is None or name in _OWN_RULES or (name in _EMPTY and not value):
            continue
        if name in _KEPT and not isinstance(value, str):
            raise _type_error(f"{where}.{name}", "a string", value)
        if name in _EMPTY:
            raise UnsupportedParameter(
                f"{where}.{name} is not supported by this server.", param=f"{where}.{name}"
            )
        kept[name] = value
    calls = message.get("tool_calls")
    if calls:
        kept["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is not None:
        kept["content"] = _content(content, f"{where}.content", as_parts)
    elif role in ("assistant", "function"):
        kept["content"] = ""  # templates concatenate it
    else:
        raise InvalidRequest(f"Missing required parameter: {where}.content.", param=f"{where}.content")
    return kept


def _content(content: Any, where: str, as_parts: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        if not content:
            raise InvalidRequest(f"{where} must not be an empty list.", param=where)
        texts = [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    else:
        raise _type_error(where, "a string or a list of content parts", content)
    if as_parts:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _type_error(where, "an object", part)
    kind = part.get("type")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise UnsupportedParameter(
            f"{where}.type {quote(kind)} is not supported: the model takes text only.", param=f"{where}.type"
        )
    text = part.get(key)
    if not isinstance(text, str):
        raise _type_error(f"{where}.{key}", "a string", text)
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls that the assistant made earlier; templates want the arguments as an object, not as JSON."""
    if not isinstance(calls, list):
        raise _type_error(where, "a list", calls)
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{where}[{i}].function.name is missing.", param=f"{where}[{i}].function")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments.encode())
            except NotJson as why:
                raise InvalidRequest(
                    f"{where}[{i}].function.arguments is not valid JSON: {why}.",
                    param=f"{where}[{i}].function.arguments",
                ) from None
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _type_error(where: str, wanted: str, got: Any) -> InvalidRequest:
    return InvalidRequest(f"{where} must be {wanted}, got {type(got).__name__}.", param=where)
