"""From a request of the Responses API to a chat: the fields of a chat request that asks for the same.

    instructions ─▶ a system message, before what came earlier (previous_response_id)
    input        ─▶ messages     message · reasoning ┐ of one turn: one message of the assistant
                                 function_call       ┘
                                 function_call_output ─▶ a message of the role tool
    tools, tool_choice, text.format, reasoning.effort ─▶ the chat's

What a chat cannot do is refused by the chat; `format` puts this dialect's names into what it says. It knows
both dialects' requests and no answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.http.body import NotJson, parse_json
from penstock.server.ignored import Ignored
from penstock.server.items import chosen, field, objects, typed, wrong_type
from penstock.server.near import Names

from .shapes import ResponsesRequest

LOGPROBS = "message.output_text.logprobs"
_INCLUDES = (
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_REASONING = {"summary_text": "text", "reasoning_text": "text", "text": "text"}
_KEPT = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
"""What ids of items that had none begin with."""
_MOST_METADATA = 16
_LONGEST_KEY, _LONGEST_VALUE = 64, 512
_TEXT = Names({"format", "verbosity"})
_FORMAT = Names({"type", "name", "schema", "strict", "description"})
_TOOL = Names({"type", "name", "description", "parameters", "strict"})
_HINTS = frozenset({"allowed_callers", "async", "defer_loading", "output_schema"})
"""Of tools: for servers that search among them, or run code that calls them."""
_EFFORT = Names({"effort", "summary", "generate_summary"})
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "structured_outputs",
    "include_reasoning",
    "stream",
    "model",
)
"""Fields that a chat has, too."""


def chat_fields(
    request: ResponsesRequest, history: Sequence[Mapping[str, Any]], ignored: Ignored
) -> dict[str, Any]:
    """The fields of the chat request. Raises InvalidRequest, naming the place in this one.

    history: the conversation that this one goes on with.
    """
    _check(request, ignored)
    messages = [*history, *turns(request.input, ignored)]
    goes_on = _goes_on(request.input)
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    fields: dict[str, Any] = {
        "messages": messages,
        "chat_template_kwargs": request.chat_template_kwargs,
        "max_completion_tokens": request.max_output_tokens,
        "continue_final_message": goes_on or None,
        **_reasoning(request.reasoning, ignored),
        **_form(request.text, ignored),
    }
    for name in _SAME:
        fields[name] = getattr(request, name)
    if LOGPROBS in request.include:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    elif request.top_logprobs:
        ignored.add("top_logprobs")
    if request.tools:
        fields["tools"] = [_tool(tool, where, ignored) for where, tool in objects(request.tools, "tools")]
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    names = [tool["function"]["name"] for tool in fields.get("tools", ())]
    if (choice := _tool_choice(request.tool_choice, names)) != "auto":
        fields["tool_choice"] = choice
    return {name: value for name, value in fields.items() if value is not None}


def _check(request: ResponsesRequest, ignored: Ignored) -> None:
    most = request.max_output_tokens
    if most is not None and most < 1:
        raise InvalidRequest(f"max_output_tokens must be at least 1, got {most}.", param="max_output_tokens")
    for name in request.include:
        chosen(name, _INCLUDES, "include[]")
        if name != LOGPROBS:  # of tools and of secrets that are not here
            ignored.add(f"include.{name}")
    metadata = request.metadata
    if len(metadata) > _MOST_METADATA or any(
        len(name) > _LONGEST_KEY or len(value) > _LONGEST_VALUE for name, value in metadata.items()
    ):
        raise InvalidRequest(
            f"metadata has at most {_MOST_METADATA} keys of up to {_LONGEST_KEY} characters, with values of "
            f"up to {_LONGEST_VALUE}.",
            param="metadata",
        )


# ---- what was said ----


def turns(given: str | list[dict[str, Any]], ignored: Ignored) -> list[dict[str, Any]]:
    """The input's messages; what the assistant said, thought and called in one turn is one of them."""
    if isinstance(given, str):
        if not given:
            raise InvalidRequest("input must not be empty.", param="input")
        return [{"role": "user", "content": given}]
    if not given:
        raise InvalidRequest("input must not be empty.", param="input")
    messages: list[dict[str, Any]] = []
    open_turn = False
    for where, item in objects(given, "input"):
        said = _item(item, where, ignored)
        last = messages[-1] if messages and open_turn else None
        if last is not None and said["role"] == "assistant" and not (said.get("content") and _spoken(last)):
            for name, value in said.items():
                if name == "tool_calls":
                    last.setdefault(name, []).extend(value)
                elif name != "role":
                    last[name] = last.get(name, "") + value
        else:
            messages.append(said)
        open_turn = said["role"] == "assistant"
    return messages


def _spoken(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))


def _goes_on(given: str | list[dict[str, Any]]) -> bool:
    """Whether the last item is a message of the assistant that is not whole, as in vLLM."""
    if isinstance(given, str) or not given:
        return False
    last = given[-1]
    said = last.get("type", "message") == "message" and last.get("role") == "assistant"
    return said and last.get("status") in ("in_progress", "incomplete")


def _item(item: Mapping[str, Any], where: str, ignored: Ignored) -> dict[str, Any]:
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        role = chosen(item.get("role"), _ROLES, f"{where}.role")
        return {"role": role, "content": _content(item.get("content"), f"{where}.content")}
    if kind == "function_call":
        function = {"name": field(item, "name", str, where), "arguments": _arguments(item, where)}
        call = {"id": field(item, "call_id", str, where), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        output = _content(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": field(item, "call_id", str, where), "content": output}
    if kind == "reasoning":
        if item.get("encrypted_content"):
            ignored.add("input[].encrypted_content")
        name = "content" if item.get("content") else "summary"
        return {
            "role": "assistant",
            "reasoning": _joined(item.get(name) or [], f"{where}.{name}", _REASONING),
        }
    raise UnsupportedParameter(
        f"{where}.type {quote(kind)} is not supported.",
        param=f"{where}.type",
        advice="Items are message, function_call, function_call_output, reasoning and item_reference.",
    )


def _arguments(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Of a call: JSON of an object; nothing at all is none."""
    place = f"{where}.arguments"
    try:
        arguments = parse_json(field(item, "arguments", str, where).encode() or b"{}")
    except NotJson as why:
        raise InvalidRequest(f"{place} is not valid JSON: {why}.", param=place) from None
    if not isinstance(arguments, dict):
        raise wrong_type(place, "a JSON object", arguments)
    return arguments


def referenced(
    given: str | list[dict[str, Any]], item: Callable[[str], dict[str, Any]]
) -> str | list[dict[str, Any]]:
    """The input with its item_references replaced by what they mean, each at most once.

    item: of an id; raises where there is none.
    """
    if isinstance(given, str):
        return given
    seen: set[str] = set()
    items: list[dict[str, Any]] = []
    for where, each in objects(given, "input"):
        if each.get("type") != "item_reference":
            items.append(dict(each))
            continue
        id = field(each, "id", str, where)
        if id in seen:  # a few words would ask for a text without end
            raise InvalidRequest(f"Duplicate item found with id {quote(id)}.", param=f"{where}.id")
        seen.add(id)
        items.append(item(id))
    return items


def _content(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise wrong_type(where, "a string or a list of content parts", given)
    return _joined(given, where, _PARTS)


def _joined(parts: Any, where: str, kinds: Mapping[str, str]) -> str:
    """Texts of parts; several with a newline between, as in chats."""
    texts = []
    for place, part in objects(typed(parts, list, where), where):
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise UnsupportedParameter(
                f"{place}.type {quote(kind)} is not supported: the model takes text only.",
                param=f"{place}.type",
                advice=f"Parts here are {', '.join(kinds)}.",
            )
        texts.append(field(part, kinds[kind], str, place))
    return "\n".join(texts)


def kept_items(given: str | list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The input as it is kept: items with ids, whose texts are parts, as OpenAI tells them."""
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        own = {name: value for name, value in item.items() if value is not None}
        kind = own.setdefault("type", "message")
        if kind == "message" and isinstance(content := own.get("content"), str):
            said = own.get("role") == "assistant"
            part = {"type": "output_text", "text": content, "annotations": []}
            own["content"] = [part if said else {"type": "input_text", "text": content}]
        yield {"id": f"{_KEPT.get(kind, 'msg')}_{uuid4().hex}", **own}


# ---- how to answer ----


def _tool(tool: Mapping[str, Any], where: str, ignored: Ignored) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise UnsupportedParameter(
            f"{where}.type {quote(tool.get('type'))} is not supported: this server runs no tools of its own.",
            param=f"{where}.type",
            advice="Tools are functions.",
        )
    for name, value in tool.items():
        if name in _HINTS and value:
            ignored.add(f"tools[].{name}")
        elif value is not None and name not in _HINTS and name not in _TOOL.known:
            ignored.unknown(name, _TOOL, "tools[]")
    function: dict[str, Any] = {"name": field(tool, "name", str, where)}
    for name, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if tool.get(name) is not None:
            function[name] = typed(tool[name], kind, f"{where}.{name}")
    return {"type": "function", "function": function}


def _tool_choice(given: str | Mapping[str, Any], names: Collection[str]) -> str | dict[str, Any]:
    """As a chat says it. names: of the request's tools."""
    if isinstance(given, str):
        return chosen(given, ("auto", "none", "required"), "tool_choice")
    if given.get("type") == "allowed_tools":
        return {"type": "allowed_tools", "allowed_tools": _allowed(given, names)}
    if given.get("type") != "function":
        raise UnsupportedParameter(
            f"tool_choice.type {quote(given.get('type'))} is not supported.",
            param="tool_choice.type",
            advice='Send none, auto, required, {"type": "function", "name": …} or allowed_tools.',
        )
    return {"type": "function", "function": {"name": field(given, "name", str, "tool_choice")}}


def _allowed(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Without the object around it that a chat has."""
    where = "tool_choice.tools"
    mode = chosen(given.get("mode"), ("auto", "required"), "tool_choice.mode")
    tools = field(given, "tools", list, "tool_choice")
    if not tools:
        raise InvalidRequest(f"{where} must not be empty.", param=where)
    found = []
    for place, tool in objects(tools, where):
        chosen(tool.get("type"), ("function",), f"{place}.type")
        name = field(tool, "name", str, place)
        if names:  # else the chat says that there are none
            chosen(name, names, f"{place}.name")
        found.append({"type": "function", "function": {"name": name}})
    return {"mode": mode, "tools": found}


def _reasoning(given: Mapping[str, Any], ignored: Ignored) -> dict[str, Any]:
    for name, value in given.items():
        if name not in _EFFORT.known:
            ignored.unknown(name, _EFFORT, "reasoning")
        elif name != "effort" and value is not None:
            ignored.add(f"reasoning.{name}")
    return {"reasoning_effort": given.get("effort")}


def _form(text: Mapping[str, Any], ignored: Ignored) -> dict[str, Any]:
    """text.format in the chat's words."""
    for name in text.keys() - _TEXT.known:
        ignored.unknown(name, _TEXT, "text")
    if text.get("verbosity") not in (None, "medium"):
        ignored.add("text.verbosity")
    if text.get("format") is None:
        return {}
    form = typed(text["format"], dict, "text.format")
    for name, value in form.items():
        if value is not None and name not in _FORMAT.known:
            ignored.unknown(name, _FORMAT, "text.format")
    kind = chosen(form.get("type"), ("text", "json_object", "json_schema"), "text.format.type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": kind}}
    schema: dict[str, Any] = {
        "name": field(form, "name", str, "text.format"),
        "schema": field(form, "schema", dict, "text.format"),
    }
    for name in ("description", "strict"):
        if form.get(name) is not None:
            schema[name] = form[name]
    return {"response_format": {"type": kind, "json_schema": schema}}
