"""POST /v1/responses, as a format on the one pipeline, and what may be done with a response afterwards.

    GET /v1/responses/ID · DELETE · POST …/cancel · GET …/input_items      its owner's: others get a 404

A response belongs to the key that it was made with, or to the tenant that a gateway spoke for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl
from uuid import uuid4

from msgspec.json import encode
from msgspec.structs import replace as replace_fields
from starlette.types import Receive, Scope, Send

from penstock.core.errors import InvalidRequest, PenstockError, UnsupportedParameter, quote
from penstock.http.errors import error_bytes
from penstock.http.exchange import respond
from penstock.server import tokens
from penstock.server.behalf import owner_of
from penstock.server.chat import ChatFormat
from penstock.server.generation import Generation
from penstock.server.ignored import Ignored
from penstock.server.pipeline import Ask, decoded, generate, whole_body
from penstock.server.protocol import ChatRequest, decode
from penstock.server.renamed import Renamed
from penstock.server.render import render
from penstock.server.state import State

from .answer import ResponsesWriter
from .background import BackgroundWriter, follow
from .request import chat_fields, referenced, turns
from .shapes import DeletedResponse, InputTokens, ResponsesRequest
from .store import ResponseNotFound, ResponseStore

_NUMBER = re.compile(r"-1|[0-9]{1,9}", re.ASCII)
_NAMES = Renamed(
    (
        (r"\btools\[(\d*)\]\.function\b", r"tools[\1]"),
        (r"\bresponse_format\.json_schema\b", "text.format"),
        (r"\bresponse_format\b", "text.format"),
        (r"\breasoning_effort\b", "reasoning.effort"),
    )
)
_OFF = "Start the server with --max-stored-responses, and with one API process."


class ResponsesFormat:
    """See Format. One for each request: it knows whose it is, and what it goes on with."""

    shape = ResponsesRequest
    prefix = "resp_"
    prompt = "input"
    marks: tuple[str, ...] = ()
    pools = False
    empty = ChatFormat.empty

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._conversation: tuple[Mapping[str, Any], ...] = ()
        self._keeps = False
        self._asked: ResponsesRequest | None = None
        """The request, with what its item_references mean."""

    async def ask(self, state: State, request: ResponsesRequest, ignored: Ignored) -> Ask:
        """See Format."""
        ignored.renamed = _NAMES.text
        store = state.responses
        history: tuple[Mapping[str, Any], ...] = ()
        if request.previous_response_id is not None:
            history = self._earlier(store, request.previous_response_id)
        self._keeps = store is not None and request.store is not False
        if store is None and request.store:
            ignored.add("store")
        if request.background and not self._keeps:
            raise InvalidRequest(
                "background can only be used when `store` is true: the response has to be kept.",
                param="background",
                advice=_OFF if store is None else "Leave out store, or send true.",
            )
        self._asked = request = replace_fields(request, input=self._referenced(store, request))
        chat = decode(chat_fields(request, history, ignored), ChatRequest, ignored)
        self._conversation = (*history, *turns(request.input, ignored))
        ask = await ChatFormat().ask(state, chat, ignored)
        return replace(ask, limit="max_output_tokens")

    def error(self, error: PenstockError) -> bytes:
        """See Format. What is refused before a chat is made of it has the client's own names."""
        return error_bytes(error if self._asked is None else _NAMES.error(error))

    def writer(
        self, state: State, request: ResponsesRequest, id: str, generation: Generation
    ) -> ResponsesWriter:
        """See Format. The id is one that no client can have chosen: others' responses are kept by theirs."""
        made = BackgroundWriter if request.background else ResponsesWriter
        return made(
            state,
            self._asked or request,
            f"resp_{uuid4().hex}",
            owner=self._owner,
            store=state.responses if self._keeps else None,
            conversation=self._conversation,
        )

    def _referenced(self, store: ResponseStore | None, request: ResponsesRequest) -> Any:
        def item(id: str) -> dict[str, Any]:
            if store is None:
                raise UnsupportedParameter(
                    "item_reference is not supported: this server keeps no responses.",
                    param="input",
                    advice=_OFF,
                )
            return store.item(id, self._owner)

        return referenced(request.input, item)

    def _earlier(self, store: ResponseStore | None, id: str) -> tuple[Mapping[str, Any], ...]:
        if store is None:
            raise UnsupportedParameter(
                "previous_response_id is not supported: this server keeps no responses.",
                param="previous_response_id",
                advice=_OFF,
            )
        try:
            entry = store.get(id, self._owner)
        except ResponseNotFound:
            error = InvalidRequest(
                f"Previous response with id {quote(id)} not found.", param="previous_response_id"
            )
            error.code = "previous_response_not_found"
            raise error from None
        status = entry.response["status"]
        if status not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"The previous response is {status}: there is nothing to go on with.",
                param="previous_response_id",
            )
        return tuple(entry.conversation)


async def create(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """An answer to texts and items, whole, as a stream of events or in the background."""
    await generate(ResponsesFormat(owner_of(scope)), state, scope, receive, send)


async def render_response(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """What the engine would be asked for a response, what it goes on with included."""
    await render(ResponsesFormat(owner_of(scope)), state, scope, receive, send)


async def count_tokens(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """How many tokens of input a response would have, what it goes on with included."""
    format = ResponsesFormat(owner_of(scope))
    scope["error_body"] = format.error
    body = await whole_body(state, scope, receive)
    request, ignored = await decoded(state, body, lambda _: ResponsesRequest)
    state.check_model(request.model)
    state.check_runner(False)
    ask = await format.ask(state, request, ignored)
    ignored.tell(scope, state.ignored_log)
    (text,) = ask.inputs
    assert isinstance(text, str)  # as the chat template has written it
    count = await tokens.count_tokens(state, text, request.add_special_tokens, "input")
    await respond(send, encode(InputTokens(input_tokens=count)))


async def retrieve(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """A response that was made before; its events, with `stream`."""
    query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
    entry = _kept(state).get(scope["path_params"]["name"], owner_of(scope))
    if query.get("stream", "false").lower() in ("false", "0"):
        await respond(send, encode(entry.response))
        return
    after = query.get("starting_after", "-1")
    if not _NUMBER.fullmatch(after):
        raise InvalidRequest(
            f"starting_after must be the sequence_number of an event, got {quote(after)}.",
            param="starting_after",
        )
    if entry.events is None:
        raise UnsupportedParameter(
            "stream is not supported here: the events of this response are not kept.",
            param="stream",
            advice="They are where it was made with background and stream; leave stream out.",
        )
    await follow(send, entry.events, int(after))


async def delete(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Forget a response; one that is still being made ends."""
    id = scope["path_params"]["name"]
    entry = _kept(state).delete(id, owner_of(scope))
    if entry.cancel is not None:
        entry.cancel()
    await respond(send, encode(DeletedResponse(id=id)))


async def cancel(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """End a response that is being made in the background. What is whole stays as it is."""
    store, id, owner = _kept(state), scope["path_params"]["name"], owner_of(scope)
    entry = store.get(id, owner)
    if not entry.response["background"]:
        raise InvalidRequest(
            "Cannot cancel a synchronous response.",
            param="response_id",
            advice="Only those with background can be; leave the connection to end others.",
        )
    if entry.cancel is not None:
        entry.cancel()
        entry.cancel = None
        entry.response = {**entry.response, "status": "cancelled"}
    await respond(send, encode(entry.response))


async def input_items(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """What a response was asked, page by page."""
    entry = _kept(state).get(scope["path_params"]["name"], owner_of(scope))
    query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= 100):
        raise InvalidRequest(f"limit must be from 1 to 100, got {quote(limit)}.", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order must be asc or desc, got {quote(order)}.", param="order")
    items = list(entry.items) if order == "asc" else list(reversed(entry.items))
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest(f"There is no item {quote(after)}.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    body = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }
    await respond(send, encode(body))


def _kept(state: State) -> ResponseStore:
    if state.responses is None:
        raise ResponseNotFound("This server keeps no responses.", advice=_OFF)
    return state.responses
