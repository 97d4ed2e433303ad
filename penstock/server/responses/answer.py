"""From a chat's answer to a response, whole or as events.

    response.created · response.in_progress · items (`items`) · response.completed, or .incomplete

Events are numbered from 0. When it is whole, a response is kept for whoever goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec.json import encode

from penstock.core.errors import PenstockError
from penstock.http.dialects import responses_error_event
from penstock.http.sse import event
from penstock.server.generation import Choice, Generation
from penstock.server.logprobs import chat_logprobs
from penstock.server.pieces import pieces
from penstock.server.state import State
from penstock.text.output import DecodedLogprob

from .items import Items, said
from .request import LOGPROBS, kept_items
from .shapes import ResponsesRequest
from .store import Entry, ResponseStore
from .told import Told

_BILL = ("device_seconds", "queue_ms", "prefill_ms", "ttft_ms", "decode_ms")


class ResponsesWriter:
    """See Writer and Stream."""

    def __init__(
        self,
        state: State,
        request: ResponsesRequest,
        id: str,
        *,
        owner: str,
        store: ResponseStore | None,
        conversation: tuple[Mapping[str, Any], ...],
    ) -> None:
        """Args:
        owner: whose the response is.
        store: where it is kept; None: nowhere.
        conversation: all messages that it answers, instructions left out.
        """
        self.interval = state.config.stream_interval
        self._state = state
        self._request = request
        self._owner = owner
        self._store = store
        self._conversation = conversation
        self._number = 0
        self._thinks = request.include_reasoning is not False
        self._items = Items()
        self._told = Told() if LOGPROBS in request.include else None
        self.response = _response(state, request, id, stored=store is not None)

    @property
    def stream(self) -> ResponsesWriter | None:
        """See Writer."""
        return self if self._request.stream else None

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        (choice,) = generation.choices
        for _ in self._grow(choice):
            pass
        for _ in self._end(generation):
            pass
        yield encode(self.response)

    def opening(self, choice: Choice) -> bytes:
        """See Stream."""
        self.response["status"] = "in_progress"
        told = {"response": self.response}
        return self._event("response.created", told) + self._event("response.in_progress", told)

    def chunks(self, choice: Choice) -> bytes:
        """See Stream. Tokens without text make no event."""
        return b"".join(self._event(*each) for each in self._grow(choice))

    def ending(self, generation: Generation) -> bytes:
        """See Stream."""
        events = [self._event(*each) for each in self._end(generation)]
        events.append(self._event(f"response.{self.response['status']}", {"response": self.response}))
        return b"".join(events)

    def error(self, error: PenstockError) -> bytes:
        """See Stream."""
        return responses_error_event(error, self._number)

    def keep(self, **entry: Any) -> bool:
        """Have the response as it is now found under its id; False where it is not kept."""
        return self._store is not None and self._store.put(
            self.response["id"],
            Entry(
                owner=self._owner,
                response=dict(self.response),
                items=tuple(kept_items(self._request.input)),
                **entry,
            ),
        )

    def _grow(self, choice: Choice) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._told is None:
            for piece in pieces(choice):
                if piece.kind != "thought" or self._thinks:
                    yield from self._items.add(piece)
            return
        for piece, logprobs in self._told.pieces(choice):
            if piece.kind != "thought" or self._thinks:
                yield from self._items.add(piece, self._logprobs(logprobs))

    def _logprobs(self, entries: list[DecodedLogprob]) -> list[dict[str, Any]]:
        """In the shape of a chat, which is that of this dialect, too."""
        if not entries:
            return []
        as_ids = bool(self._state.config.return_tokens_as_token_ids)
        told = chat_logprobs(entries, self._request.top_logprobs, as_ids=as_ids)
        found: list[dict[str, Any]] = msgspec.json.decode(told["content"])
        return found

    def _end(self, generation: Generation) -> Iterator[tuple[str, dict[str, Any]]]:
        """The last events of items; the response is whole then, and kept."""
        (choice,) = generation.choices
        reason = choice.pending.finish_reason
        status = {"length": "incomplete", "abort": "cancelled"}.get(reason or "", "completed")
        yield from self._items.close("completed" if status == "completed" else "incomplete")
        self.response |= {
            "status": status,
            "completed_at": int(self._state.wall()),
            "output": self._items.done,
            "usage": _usage(generation),
        }
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.keep(conversation=(*self._conversation, said(self._items.done)))

    def _event(self, name: str, fields: Mapping[str, Any]) -> bytes:
        numbered = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return event(encode(numbered), name)


def _response(state: State, request: ResponsesRequest, id: str, *, stored: bool) -> dict[str, Any]:
    """The response object, with nothing in it yet."""
    defaults = state.default_sampling
    temperature = defaults.get("temperature", 1.0) if request.temperature is None else request.temperature
    return {
        "id": id,
        "object": "response",
        "created_at": int(state.wall()),
        "completed_at": None,
        "status": "in_progress",
        "background": request.background,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "model": state.model_name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None, "summary": None, **request.reasoning},
        "store": stored,
        "temperature": temperature,
        "text": {"format": {"type": "text"}, **request.text},
        "tool_choice": request.tool_choice,
        "tools": request.tools,
        "top_logprobs": request.top_logprobs,
        "top_p": defaults.get("top_p", 1.0) if request.top_p is None else request.top_p,
        "truncation": request.truncation,
        "usage": None,
    }


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    details = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
        **{name: usage[name] for name in _BILL},
    }
