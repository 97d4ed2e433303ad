"""What a request would have its upstream do or look up beyond answering: refused, unless its route allows it.

    tools that the upstream runs    web search, code interpreter, MCP, …     extra_costs: true
    a dearer tier                   service_tier: priority                   extra_costs: true
    what its account has            item_reference, prompt, vector stores    shared_ids: true

What such a tool costs, and how many turns it makes of one request, is in no reservation and in no usage. And
all keys share the upstream's account: whoever knows an id there could use what is another's. Files are
refused by the envelope; a response's own id is its owner's (owned.py).
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from penstock.core.errors import UnsupportedParameter, quote

from .envelope import Envelope, decoded
from .policy.routes import Way

_CLIENTS = frozenset(
    {None, "function", "custom", "computer", "computer_use_preview", "local_shell", "apply_patch"}
)
"""Types of tools whose calls the client carries out itself; None is an upstream's matter."""
_CLIENTS_OF_MESSAGES = ("custom", "bash_", "text_editor_", "computer_", "memory_")
"""How they begin in Anthropic's dialect, with a date behind them."""
_SEARCHES = ("web_search_options", "search_parameters", "plugins", "mcp_servers")
"""Fields that have the upstream search or call others, at OpenAI, xAI, OpenRouter and Anthropic."""
_DEARER = ("priority", "fast")
"""Values of service_tier."""


class _Tool(msgspec.Struct):
    """The head of a tool."""

    type: Any = None
    container: Any = None
    environment: Any = None
    vector_store_ids: Any = None


class _Item(msgspec.Struct):
    """The head of an entry of `input`."""

    type: Any = None
    id: Any = None
    role: Any = None


_H = TypeVar("_H", _Tool, _Item)
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    _Tool: msgspec.json.Decoder(list[_Tool]),
    _Item: msgspec.json.Decoder(list[_Item]),
}


def check(envelope: Envelope, way: Way) -> None:
    """Raise UnsupportedParameter for what the way's route does not allow, or the one that it escalates to."""
    if way.escalation is not None:
        check(envelope, way.escalation)
    route = way.route
    if not envelope.endpoint.caps:
        return
    tools = _heads(envelope.raw("tools"), _Tool)
    if not route.extra_costs:
        for tool in tools:
            if not _runs_at_client(tool, envelope.endpoint.path):
                raise _costs(f"A tool of the type {quote(tool.type)} is run by the upstream", "tools")
        for name in _SEARCHES:
            if envelope.asks_for((name,)):
                raise _costs(f"{name} is carried out by the upstream", name)
        if _value(envelope, "service_tier") in _DEARER and _by_tokens(way):
            raise _costs("This service_tier is dearer than the price of the spec", "service_tier")
    if not route.shared_ids:
        for tool in tools:
            if isinstance(tool.container, str) or tool.vector_store_ids:
                raise _shares("A container or vector store", "tools")
        if envelope.endpoint.path == "/v1/messages":
            if envelope.asks_for(("container",)):
                raise _shares("A container", "container")
        elif envelope.endpoint.path == "/v1/responses":
            if envelope.asks_for(("prompt",)):
                raise _shares("A stored prompt", "prompt")
            if any(map(_refers, _heads(envelope.raw("input"), _Item))):
                raise _shares("An item_reference", "input")


def _runs_at_client(tool: _Tool, path: str) -> bool:
    if path == "/v1/messages":
        return tool.type is None or str(tool.type).startswith(_CLIENTS_OF_MESSAGES)
    if tool.type == "shell":
        return isinstance(tool.environment, dict) and tool.environment.get("type") == "local"
    return tool.type in _CLIENTS if tool.type is None or isinstance(tool.type, str) else False


def _refers(item: _Item) -> bool:
    """Whether it stands for an item that the upstream has; the type may be left out."""
    return item.type == "item_reference" or (item.id is not None and item.type is None and item.role is None)


def _by_tokens(way: Way) -> bool:
    return any(place.price is not None for place in (*way.targets, *way.fallback))


def _heads(raw: bytes, shape: type[_H]) -> list[_H]:
    """Of a list of objects; of anything else nothing, since no upstream takes that for one."""
    if raw[:1] != b"[":
        return []
    try:
        found: list[_H] = _DECODERS[shape].decode(raw)
        return found
    except (msgspec.MsgspecError, RecursionError):
        return [msgspec.convert(each, shape) for each in decoded(raw) if isinstance(each, dict)]


def _value(envelope: Envelope, name: str) -> Any:
    raw = envelope.raw(name)
    return decoded(raw) if raw[:1] == b'"' else None


def _costs(what: str, param: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{what}: what it costs is in no reservation, and this route does not allow it.",
        param=param,
        advice="In penstock.yaml, a route that does has `extra_costs: true`.",
    )


def _shares(what: str, param: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{what} of the upstream's account is anybody's who knows its id, and this route does not allow it.",
        param=param,
        advice="Send what it holds, or, in penstock.yaml, give the route `shared_ids: true`.",
    )
