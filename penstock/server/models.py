"""GET /v1/models and GET /v1/models/{id}: one entry for each served name, with vLLM's extra fields."""

from __future__ import annotations

from typing import Any

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.http.exchange import respond

from .state import State


async def list_models(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """All names."""
    await respond(send, encode({"object": "list", "data": [_card(state, n) for n in state.model_names]}))


async def get_model(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """One name; it may contain slashes."""
    name = str(scope["path_params"]["name"])
    state.check_model(name)
    await respond(send, encode(_card(state, name)))


def _card(state: State, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "penstock",
        "root": state.engine.info.path,
        "parent": None,
        "max_model_len": state.engine.info.max_model_len,
        "permission": [],
    }
