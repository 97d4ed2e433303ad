"""What a request says of tools: which there are, and which of them the model may or must call.

    tools, tool_choice, parallel_tool_calls ──▶ read_tools ──▶ ToolUse
                                                                 ├─ offered: as the chat template reads them
                                                                 └─ parser, of each choice's text

Dialects write these fields in their own ways; they bring them into OpenAI's form, and all the rest is here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.core.errors import InvalidRequest, UnsupportedParameter, quote
from penstock.text.parsers.tools import Tool

from .config import ServerConfig
from .ignored import Ignored
from .near import Names

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""OpenAI's rule; with the dots of vLLM's namespaces."""
_TOOL = Names(("type", "function"))
_FUNCTION = Names(("name", "description", "parameters", "strict"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Checked. Without tools there is none of it."""

    tools: tuple[Tool, ...]
    choice: Literal["none", "auto", "required", "named"]
    name: str = ""
    """Of the only tool that may be called, where the choice is named."""
    allowed: frozenset[str] | None = None
    """Names of those that may be called, where the choice says so; the others are offered all the same."""
    parallel: bool = True
    """Whether an answer may have several calls."""
    offered: tuple[Mapping[str, Any], ...] = ()
    """The tools as the chat template reads them, in OpenAI's form."""

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that the answer may call."""
        if self.choice == "none":
            return ()
        names = {self.name} if self.name else self.allowed
        return tuple(tool for tool in self.tools if names is None or tool.name in names)

    @property
    def single(self) -> bool:
        """Whether no second call is wanted."""
        return not self.parallel or self.choice == "named"

    @property
    def must(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice in ("required", "named")


def read_tools(
    tools: Sequence[Any] | None,
    choice: object,
    parallel: bool | None,
    config: ServerConfig,
    ignored: Ignored,
) -> ToolUse | None:
    """What OpenAI's fields say; None where there are no tools.

    Raises InvalidRequest, naming the field, for tools that cannot be called, a choice that does not fit to
    them, and a server that has not been told how its model writes calls.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(
                "tool_choice needs tools.", param="tool_choice", advice="Send them in tools, or leave it out."
            )
        return None
    read = tuple(_tool(tool, f"tools[{i}]", ignored) for i, tool in enumerate(tools))
    names: dict[str, int] = {}
    for i, tool in enumerate(read):
        if (first := names.setdefault(tool.name, i)) != i:
            raise InvalidRequest(
                f"tools[{i}].function.name {quote(tool.name)} is the name of tools[{first}], too.",
                param=f"tools[{i}].function.name",
                advice="Give each tool a name of its own.",
            )
    allowed = None
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        choice, allowed = _allowed(choice, names)
    kind, name = _choice(choice, names)
    _check_server(kind, name, config)
    use = ToolUse(
        tools=read,
        choice=kind,
        name=name,
        allowed=allowed,
        parallel=parallel is not False,
        offered=tuple(tools),
    )
    if kind == "none" and config.exclude_tools_when_tool_choice_none:
        return None
    return use


def _tool(tool: Any, where: str, ignored: Ignored) -> Tool:
    if not isinstance(tool, Mapping):
        raise _type_error(where, "an object", tool)
    kind = tool.get("type", "function")
    if kind != "function":
        raise UnsupportedParameter(
            f"{where}.type {quote(kind)} is not supported: tools are functions.", param=f"{where}.type"
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _type_error(f"{where}.function", "an object", function)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.function.name must have 1 to 64 letters, digits, _, - and dots, got {quote(name)}.",
            param=f"{where}.function.name",
        )
    description, parameters, strict = (function.get(key) for key in ("description", "parameters", "strict"))
    if description is not None and not isinstance(description, str):
        raise _type_error(f"{where}.function.description", "a string", description)
    if strict is not None and not isinstance(strict, bool):
        raise _type_error(f"{where}.function.strict", "true or false", strict)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise _type_error(f"{where}.function.parameters", "a JSON schema, which is an object", parameters)
    if parameters and parameters.get("type", "object") != "object":
        raise InvalidRequest(
            f"{where}.function.parameters.type must be object, got {quote(parameters['type'])}.",
            param=f"{where}.function.parameters",
        )
    for given, known, place in ((tool, _TOOL, "tools[]"), (function, _FUNCTION, "tools[].function")):
        for key, value in given.items():
            if value is not None and key not in known.known:
                ignored.unknown(key, known, place)
    return Tool(name, dict(parameters or {}), description or "", strict)


def _choice(
    choice: object, names: Mapping[str, int]
) -> tuple[Literal["none", "auto", "required", "named"], str]:
    """(kind, name of the tool if one is named)"""
    match choice:
        case None | "auto":
            return "auto", ""
        case "none":
            return "none", ""
        case "required":
            return "required", ""
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise InvalidRequest(
                    f"tool_choice names {quote(name)}, which is none of the tools: {', '.join(names)}.",
                    param="tool_choice",
                )
            return "named", name
        case _:
            raise InvalidRequest(
                'tool_choice must be none, auto, required, {"type": "function", "function": {"name": …}} or '
                '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}, got '
                f"{quote(choice)}.",
                param="tool_choice",
            )


def _allowed(choice: Mapping[str, Any], names: Mapping[str, int]) -> tuple[object, frozenset[str]]:
    """(auto or required, names of the tools that may be called): OpenAI's `allowed_tools`."""
    where = "tool_choice.allowed_tools"
    inner = choice.get("allowed_tools")
    if not isinstance(inner, Mapping):
        raise _type_error(where, "an object", inner)
    mode, tools = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(
            f"{where}.mode must be auto or required, got {quote(mode)}.", param=f"{where}.mode"
        )
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest(
            f"{where}.tools must be a list of tools that is not empty, got {quote(tools)}.",
            param=f"{where}.tools",
        )
    found = set()
    for place, tool in enumerate(tools):
        match tool:
            case {"type": "function", "function": {"name": str(name)}} if name in names:
                found.add(name)
            case _:
                raise InvalidRequest(
                    f"{where}.tools[{place}] must be one of the tools, "
                    f'{{"type": "function", "function": {{"name": …}}}}, got {quote(tool)}.',
                    param=f"{where}.tools[{place}]",
                )
    return mode, frozenset(found)


def _check_server(kind: str, name: str, config: ServerConfig) -> None:
    """As vLLM answers where it has no parser."""
    if kind == "auto" and not (config.enable_auto_tool_choice and config.tool_call_parser):
        raise InvalidRequest(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set.',
            param="tool_choice",
            advice='Start the server with them, or send tool_choice "none".',
        )
    if kind in ("required", "named") and not config.tool_call_parser:
        wanted = f"function {quote(name)}" if name else f'"{kind}"'
        raise InvalidRequest(
            f"tool_choice {wanted} requires --tool-call-parser to be set.",
            param="tool_choice",
            advice="Start the server with it.",
        )


def _type_error(where: str, wanted: str, got: object) -> InvalidRequest:
    error = InvalidRequest(f"{where} must be {wanted}, got {type(got).__name__}.", param=where)
    error.code = "invalid_type"
    return error
