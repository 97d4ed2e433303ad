"""From Anthropic's Messages to a chat: the fields of a chat request that asks for the same.

    system, messages ─▶ messages       text · image ✗ · thinking ─▶ reasoning · tool_use ─▶ tool_calls
                                        tool_result ─▶ a message of its own, of the role tool
    stop_sequences   ─▶ stop           tools ─▶ functions        tool_choice any ─▶ required
    thinking, output_config.effort ─▶ reasoning_effort, the template's enable_thinking, thinking_token_budget

What a chat cannot do is refused by the chat, under the chat's name for it. A last message of the assistant is
gone on with, as at Anthropic. `cache_control` marks what is to be cached; here every prefix is, so it asks
for what is so anyway.

It knows both dialects' requests and no answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.server.ignored import Ignored
from penstock.server.items import chosen, field, named, objects, typed, wrong_type
from penstock.server.near import Names

from .shapes import CountTokensRequest, MessagesRequest

_LEAST_BUDGET = 1024
"""Tokens of thinking, as at Anthropic."""
_ATTRIBUTION = "x-anthropic-billing-header"
"""Begins a system text in which Claude Code has a hash of every request: no prefix could be shared."""
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_DISPLAYS = ("summarized", "omitted", "updates")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_BLOCKS = {
    "text": Names({"type", "text", "cache_control", "citations"}),
    "thinking": Names({"type", "thinking", "signature", "cache_control"}),
    "redacted_thinking": Names({"type", "data", "cache_control"}),
    "tool_use": Names({"type", "id", "name", "input", "cache_control", "caller"}),
    "tool_result": Names({"type", "tool_use_id", "content", "is_error", "cache_control"}),
}
_TOOL = Names(
    {
        "type",
        "name",
        "description",
        "input_schema",
        "cache_control",
        "strict",
        "input_examples",
        "eager_input_streaming",
        "allowed_callers",
        "defer_loading",
    }
)
_OUTPUT = Names({"effort", "format"})
_THOUGHT = Names({"type", "budget_tokens", "display"})
_CHOICE = Names({"type", "name", "disable_parallel_tool_use"})


def chat_fields(request: MessagesRequest | CountTokensRequest, ignored: Ignored) -> dict[str, Any]:
    """The fields of the chat request. Raises InvalidRequest, naming the place in this one."""
    reader = _Reader(ignored)
    if request.cache_control is not None:
        reader.cache(request.cache_control, "cache_control")
    messages = [*reader.system(request.system)]
    for where, message in objects(request.messages, "messages"):
        messages += reader.message(message, where)
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "chat_template_kwargs": request.chat_template_kwargs,
        **reader.output(request.output_config, request.output_format),
    }
    if messages and messages[-1]["role"] == "assistant":
        if "tool_calls" in messages[-1]:
            raise InvalidRequest(
                "The last message has tool_use blocks: their tool_result blocks are missing.",
                param="messages",
            )
        fields["continue_final_message"] = True
    if request.tools:
        fields["tools"] = [reader.tool(tool, where) for where, tool in objects(request.tools, "tools")]
    if request.tool_choice is not None:
        fields.update(reader.tool_choice(request.tool_choice))
    most = request.max_tokens if isinstance(request, MessagesRequest) else None
    if request.thinking is not None:
        reader.thinking(request.thinking, most, fields)
    if isinstance(request, MessagesRequest):
        fields |= {
            "max_tokens": request.max_tokens,
            "stop": request.stop_sequences,
            "stream": request.stream,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
        }
        if request.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens must be at least 1, got {request.max_tokens}.", param="max_tokens"
            )
        if any(not stop for stop in request.stop_sequences):
            raise InvalidRequest("stop_sequences must not hold empty strings.", param="stop_sequences")
    return fields


class _Reader:
    """Reads one request."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored

    def system(self, given: str | list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The system's message, if there is one: the texts one behind the other, as in vLLM."""
        if isinstance(given, str):
            text = self._said(given, "system")
        else:
            text = "".join(
                self._said(self._text(block, where, ("text",)), "system[].text")
                for where, block in objects(given, "system")
            )
        if text:
            yield {"role": "system", "content": text}

    def message(self, message: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
        """One message; results of tools become messages before it."""
        role = chosen(message.get("role"), ("user", "assistant", "system"), f"{where}.role")
        content = message.get("content")
        for name in message.keys() - {"role", "content"}:
            self._ignored.unknown(name, Names({"role", "content"}), "messages[]")
        if role == "system":
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            yield from self.system(typed(parts, list, f"{where}.content"))
            return
        if isinstance(content, str):
            yield {"role": role, "content": content}
            return
        if not isinstance(content, list):
            raise wrong_type(f"{where}.content", "a string or a list of content blocks", content)
        if not content and role == "user":
            raise InvalidRequest(f"{where}.content must not be empty.", param=f"{where}.content")
        yield from self._blocks(role, content, f"{where}.content")

    def _blocks(self, role: str, content: list[Any], where: str) -> Iterator[dict[str, Any]]:
        texts: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        thoughts: list[str] = []
        allowed = ("text", "tool_result") if role == "user" else tuple(_BLOCKS)[:-1]
        results = False
        for place, block in objects(content, where):
            kind = self._kind(block, place, allowed)
            if kind == "text":
                texts.append({"type": "text", "text": field(block, "text", str, place)})
            elif kind == "thinking":
                thoughts.append(field(block, "thinking", str, place))
            elif kind == "redacted_thinking":
                named(block, "data", place)
                self._ignored.add("messages[].content[].redacted_thinking")  # nobody can read it
            elif kind == "tool_use":
                arguments = field(block, "input", dict, place)
                function = {"name": named(block, "name", place), "arguments": arguments}
                calls.append({"id": named(block, "id", place), "type": "function", "function": function})
            else:
                results = True
                yield self._result(block, place)
        message: dict[str, Any] = {"role": role}
        if texts or not results:
            message["content"] = texts[0]["text"] if len(texts) == 1 else texts
            if thoughts:
                message["reasoning"] = "".join(thoughts)
            if calls:
                message["tool_calls"] = calls
            yield message

    def _result(self, block: Mapping[str, Any], where: str) -> dict[str, Any]:
        content = block.get("content", "")
        if isinstance(content, list):
            content = "\n".join(
                self._text(part, place, ("text",)) for place, part in objects(content, f"{where}.content")
            )
        text = typed(content if content is not None else "", str, f"{where}.content")
        if block.get("is_error") not in (None, False):
            typed(block["is_error"], bool, f"{where}.is_error")
            text = f"Error: {text}"  # templates know no other way to say so
        return {"role": "tool", "tool_call_id": named(block, "tool_use_id", where), "content": text}

    def _text(self, block: Mapping[str, Any], where: str, allowed: tuple[str, ...]) -> str:
        self._kind(block, where, allowed)
        return field(block, "text", str, where)

    def _kind(self, block: Mapping[str, Any], where: str, allowed: tuple[str, ...]) -> str:
        kind = field(block, "type", str, where)
        if kind not in allowed:
            if kind in _BLOCKS:
                raise InvalidRequest(
                    f"{where}.type must be one of {', '.join(allowed)} here, got {kind}.",
                    param=f"{where}.type",
                )
            raise UnsupportedParameter(
                f"{where}.type {quote(kind)} is not supported: the model takes text only.",
                param=f"{where}.type",
                advice=f"Blocks here are {', '.join(allowed)}.",
            )
        names = _BLOCKS[kind]
        for name, value in block.items():
            if name == "cache_control" and value is not None:
                self.cache(value, f"{where}.cache_control")
            elif value is not None and name not in names.known:
                self._ignored.unknown(name, names, "content[]")
            elif name == "citations" and value:
                self._ignored.add("content[].citations")
        return kind

    def cache(self, value: Any, where: str) -> None:
        """A mark of what to cache."""
        chosen(typed(value, dict, where).get("type"), ("ephemeral",), f"{where}.type")
        if value.get("ttl") is not None:  # blocks stay as long as nobody else needs them
            self._ignored.add("cache_control.ttl")

    def _others(self, given: Mapping[str, Any], names: Names, where: str) -> None:
        for name, value in given.items():
            if value is not None and name not in names.known:
                self._ignored.unknown(name, names, where)

    def _said(self, text: Any, where: str) -> str:
        if typed(text, str, where).startswith(_ATTRIBUTION):
            self._ignored.add(_ATTRIBUTION)
            return ""
        return str(text)

    def tool(self, tool: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A function for the model."""
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise UnsupportedParameter(
                f"{where}.type {quote(kind)} is not supported: this server runs no tools of its own.",
                param=f"{where}.type",
                advice="Define the tool with name and input_schema.",
            )
        for name, value in tool.items():
            if name == "cache_control" and value is not None:
                self.cache(value, f"{where}.cache_control")
            elif value and name in ("input_examples", "eager_input_streaming", "defer_loading"):
                self._ignored.add(f"tools[].{name}")
            elif value is not None and name not in _TOOL.known:
                self._ignored.unknown(name, _TOOL, "tools[]")
        function: dict[str, Any] = {
            "name": field(tool, "name", str, where),
            "parameters": {"type": "object", **field(tool, "input_schema", dict, where)},
        }
        if tool.get("description") is not None:
            function["description"] = typed(tool["description"], str, f"{where}.description")
        if tool.get("strict") is not None:
            function["strict"] = typed(tool["strict"], bool, f"{where}.strict")
        return {"type": "function", "function": function}

    def tool_choice(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the chat that say the same."""
        self._others(given, _CHOICE, "tool_choice")
        kind = chosen(given.get("type"), (*_CHOICES, "tool"), "tool_choice.type")
        fields: dict[str, Any] = {}
        if given.get("disable_parallel_tool_use") is not None:
            single = typed(given["disable_parallel_tool_use"], bool, "tool_choice.disable_parallel_tool_use")
            fields["parallel_tool_calls"] = not single
        if kind == "tool":
            function = {"name": field(given, "name", str, "tool_choice")}
            return {"tool_choice": {"type": "function", "function": function}, **fields}
        return {"tool_choice": _CHOICES[kind], **fields}

    def output(self, given: Mapping[str, Any], older: Mapping[str, Any] | None) -> dict[str, Any]:
        """output_config: how much effort, and in which form; `older` is output_format."""
        fields: dict[str, Any] = {}
        self._others(given, _OUTPUT, "output_config")
        if given.get("effort") is not None:
            fields["reasoning_effort"] = chosen(given["effort"], _EFFORTS, "output_config.effort")
        where = "output_format" if older is not None else "output_config.format"
        form = given.get("format") if older is None else older
        if older is not None and given.get("format") is not None:
            raise InvalidRequest("output_format and output_config.format say the same.", param=where)
        if form is not None:
            chosen(typed(form, dict, where).get("type"), ("json_schema",), f"{where}.type")
            schema = field(form, "schema", dict, where)
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "output", "schema": schema, "strict": True},
            }
        return fields

    def thinking(self, given: Mapping[str, Any], max_tokens: int | None, fields: dict[str, Any]) -> None:
        """Whether the template lets the model think."""
        self._others(given, _THOUGHT, "thinking")
        kind = chosen(given.get("type"), _THINKING, "thinking.type")
        if given.get("display") is not None:
            chosen(given["display"], _DISPLAYS, "thinking.display")
        if kind == "disabled":
            fields["reasoning_effort"] = "none"
            return
        if kind == "enabled":
            budget = field(given, "budget_tokens", int, "thinking")
            if budget < _LEAST_BUDGET or (max_tokens is not None and budget >= max_tokens):
                raise InvalidRequest(
                    f"thinking.budget_tokens must be at least {_LEAST_BUDGET} and less than max_tokens, got "
                    f"{quote(budget)}.",
                    param="thinking.budget_tokens",
                )
            fields["thinking_token_budget"] = budget
            fields["chat_template_kwargs"] = {"enable_thinking": True, **fields["chat_template_kwargs"]}
