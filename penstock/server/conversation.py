"""Chat messages as clients send them, checked and brought into the form that chat templates read.

Content parts that are text, thoughts among them, are joined with newlines, or kept as parts for templates
that want them. Whatever is not text is refused by name. What an assistant's answer has beside its text and
calls (`refusal`, `annotations`, `audio`, `function_call`) is ignored, as in vLLM. Keys that OpenAI does not
know, such as `prefix`, are handed to the template, and count as ignored where it does not mention them. A
role may be any word: what it means is the template's business, too.

It knows OpenAI's message shapes; of the template it knows which words occur in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.http.body import NotJson, parse_json

from .ignored import Ignored
from .near import Names

#: Whose messages need a content; what others may leave out is their templates' business.
_WITH_CONTENT = ("system", "developer", "user", "tool")

#: Type of a text part → the key of its text.
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
#: Handed to the template as they are; texts.
_KEPT = ("name", "tool_call_id", "reasoning", "reasoning_content")
#: Parts of earlier answers that no template reads.
_ANSWERED = ("annotations", "audio", "function_call", "refusal")
_OWN_RULES = ("role", "content", "tool_calls")
_LONGEST_ROLE = 64

_MESSAGE = Names((*_OWN_RULES, *_KEPT, *_ANSWERED), never=("tools", "task", "thinking"))
_PART = Names(("type", "text", "refusal", "thinking", "closed"))
_CALL = Names(("id", "type", "function", "index"))
_FUNCTION = Names(("name", "arguments"))


def normalise(
    messages: Sequence[Mapping[str, Any]],
    ignored: Ignored | None = None,
    *,
    as_parts: bool = False,
    words: Collection[str] = (),
    where: str = "messages",
) -> list[dict[str, Any]]:
    """Messages for the template.

    Args:
        ignored: takes the names that nobody reads.
        as_parts: whether the template wants contents as lists of parts.
        words: those of the template.
        where: they stand in the request.

    Raises InvalidRequest, naming the place (`messages[2].content`).
    """
    if not messages:
        raise InvalidRequest(f"{where} must not be empty.", param=where)
    reader = _Reader(ignored or Ignored(), as_parts, words)
    return [reader.message(message, f"{where}[{i}]") for i, message in enumerate(messages)]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the messages of one request."""

    ignored: Ignored
    as_parts: bool
    words: Collection[str]

    def message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        role = message.get("role")
        if not isinstance(role, str) or not 1 <= len(role) <= _LONGEST_ROLE:
            raise InvalidRequest(
                f"{where}.role must be a text of 1 to {_LONGEST_ROLE} characters, such as user, got "
                f"{quote(role)}.",
                param=f"{where}.role",
            )
        kept: dict[str, Any] = {"role": role}
        for name, value in message.items():
            if value is None or name in _OWN_RULES:
                continue
            if name in _KEPT:
                if not isinstance(value, str):
                    raise _type_error(f"{where}.{name}", "a string", value)
            elif name in _ANSWERED:
                if not value:
                    continue
                if self.ignored.strict:
                    raise UnsupportedParameter(
                        f"{where}.{name} is not supported by this server.", param=f"{where}.{name}"
                    )
                self.ignored.add(f"messages[].{name}")
                continue
            kept[name] = value
        self._others(message, _MESSAGE, "messages[]")
        calls = message.get("tool_calls")
        if calls:
            kept["tool_calls"] = self._tool_calls(calls, f"{where}.tool_calls")
        content = message.get("content")
        if content is not None:
            kept["content"] = self._content(content, f"{where}.content")
        elif role in _WITH_CONTENT:
            raise InvalidRequest(f"Missing required parameter: {where}.content.", param=f"{where}.content")
        else:
            kept["content"] = ""  # templates concatenate it
        return kept

    def _others(self, given: Mapping[str, Any], names: Names, where: str, handed_on: bool = True) -> None:
        """Names that are none of the API's. The template reads those that it mentions, if they are
        `handed_on`; --strict-fields leaves them to it."""
        if given.keys() <= names.known or self.ignored.strict:
            return
        for name, value in given.items():
            if value is None or name in names.known or (handed_on and name in self.words):
                continue
            self.ignored.unknown(name, names, where)

    def _content(self, content: Any, where: str) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self.as_parts else content
        if not isinstance(content, list):
            raise _type_error(where, "a string or a list of content parts", content)
        if not content and self.ignored.strict:
            raise InvalidRequest(f"{where} must not be an empty list.", param=where)
        parts = [self._part(part, f"{where}[{i}]") for i, part in enumerate(content)]
        return parts if self.as_parts else "\n".join(part["text"] for part in parts)

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        """A part for the template: its text, and whatever else it has that is not the API's."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise _type_error(where, "an object", part)
        kind = part.get("type")
        key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if key is None or (key == "thinking" and self.ignored.strict):
            raise UnsupportedParameter(
                f"{where}.type {quote(kind)} is not supported: the model takes text only.",
                param=f"{where}.type",
            )
        text = part.get(key)
        if not isinstance(text, str):
            raise _type_error(f"{where}.{key}", "a string", text)
        self._others(part, _PART, "messages[].content[]", handed_on=self.as_parts)
        if not self.as_parts:
            return {"text": text}
        others = {name: value for name, value in part.items() if name not in _PART.known}
        return {"type": "text", "text": text, **others}

    def _tool_calls(self, calls: Any, where: str) -> list[dict[str, Any]]:
        """Calls that the assistant made earlier; templates want the arguments as an object, not as JSON."""
        if not isinstance(calls, list):
            raise _type_error(where, "a list", calls)
        parsed = []
        for i, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise InvalidRequest(
                    f"{where}[{i}].function.name is missing.", param=f"{where}[{i}].function"
                )
            self._others(call, _CALL, "messages[].tool_calls[]")
            self._others(function, _FUNCTION, "messages[].tool_calls[].function")
            arguments = function.get("arguments") or "{}"
            if isinstance(arguments, str):
                try:
                    arguments = parse_json(arguments.encode())
                except NotJson as why:
                    raise InvalidRequest(
                        f"{where}[{i}].function.arguments is not valid JSON: {why}.",
                        param=f"{where}[{i}].function.arguments",
                    ) from None
            if not isinstance(arguments, dict):
                raise _type_error(f"{where}[{i}].function.arguments", "a JSON object", arguments)
            parsed.append({**call, "function": {**function, "arguments": arguments}})
        return parsed


def _type_error(where: str, wanted: str, got: Any) -> InvalidRequest:
    return InvalidRequest(f"{where} must be {wanted}, got {type(got).__name__}.", param=where)
