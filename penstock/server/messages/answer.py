"""From a chat's answer to Anthropic's message, whole and as events.

    message_start                                    with the engine's first event
      content_block_start · …_delta … · …_stop       for each thought, text and call, one after the other
    message_delta                                    why it ended, and the usage
    message_stop

It knows no field of a request but whether it streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any
from uuid import uuid4

import msgspec
from msgspec.json import encode

from penstock.core.errors import PenstockError
from penstock.http.dialects import messages_error_event
from penstock.http.sse import event
from penstock.server.generation import Choice, Generation
from penstock.server.pieces import Piece, pieces
from penstock.server.state import State

from .shapes import MessagesRequest

_BILL = ("device_seconds", "queue_ms", "prefill_ms", "ttft_ms", "decode_ms")


class MessagesWriter:
    """See Writer and Stream."""

    def __init__(self, state: State, request: MessagesRequest, id: str) -> None:
        self.interval = state.config.stream_interval
        self._streams = request.stream
        self._omits = (request.thinking or {}).get("display") == "omitted"
        self._head = {"id": id, "type": "message", "role": "assistant", "model": state.model_name}
        self._open: tuple[str, int] | None = None
        """Kind and number of the block that more may be added to."""
        self._index = -1
        self._calls = False

    @property
    def stream(self) -> MessagesWriter | None:
        """See Writer."""
        return self if self._streams else None

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """See Writer."""
        (choice,) = generation.choices
        blocks: list[dict[str, Any]] = []
        for _, run in groupby(self._told(choice), key=lambda piece: (piece.kind, piece.call)):
            told = list(run)
            blocks.append(_block(told[0]))
            _fill(blocks[-1], "".join(piece.text for piece in told))
            self._calls |= blocks[-1]["type"] == "tool_use"
        end = self._end(choice)
        yield encode({**self._head, "content": blocks, **end, "usage": _usage(generation.usage())})

    def opening(self, choice: Choice) -> bytes:
        """See Stream."""
        prompt = len(choice.prompt.ids)
        cached = min(choice.cached, prompt)
        counts = {"prompt_tokens": prompt, "completion_tokens": 0}
        usage = _usage({**counts, "prompt_tokens_details": {"cached_tokens": cached}})
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event("message_start", message=message)

    def chunks(self, choice: Choice) -> bytes:
        """See Stream. Tokens without text make no event."""
        events = []
        for piece in self._told(choice):
            if self._open != (piece.kind, piece.call):
                events.append(self._close())
                self._open = (piece.kind, piece.call)
                self._index += 1
                self._calls |= piece.kind == "call"
                events.append(_event("content_block_start", index=self._index, content_block=_block(piece)))
            if piece.text:
                events.append(_event("content_block_delta", index=self._index, delta=_delta(piece)))
        return b"".join(events)

    def ending(self, generation: Generation) -> bytes:
        """See Stream."""
        (choice,) = generation.choices
        usage = _usage(generation.usage())
        last = _event("message_delta", delta=self._end(choice), usage=usage)
        return self._close() + last + _event("message_stop")

    def error(self, error: PenstockError) -> bytes:
        """See Stream. No message_stop follows: the answer is not whole."""
        return messages_error_event(error)

    def _told(self, choice: Choice) -> Iterator[Piece]:
        """What is pending; of thoughts that are not to be shown, only that there are some."""
        for piece in pieces(choice):
            yield replace(piece, text="") if piece.kind == "thought" and self._omits else piece

    def _close(self) -> bytes:
        """The end of the block that is open; a thought is signed first, as clients expect it."""
        if self._open is None:
            return b""
        kind, self._open = self._open[0], None
        signed = b""
        if kind == "thought":
            delta = {"type": "signature_delta", "signature": uuid4().hex}
            signed = _event("content_block_delta", index=self._index, delta=delta)
        return signed + _event("content_block_stop", index=self._index)

    def _end(self, choice: Choice) -> dict[str, str | None]:
        """Why it ended. A call that a stop sequence cuts short is not one to be run."""
        reason, by = choice.pending.finish_reason, choice.pending.stop_reason
        if reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(by, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": by}
        return {"stop_reason": "tool_use" if self._calls else "end_turn", "stop_sequence": None}


def _block(piece: Piece) -> dict[str, Any]:
    """The block that a piece begins, still empty."""
    if piece.kind == "call":
        # Anthropic's ids; a parser whose model has ids of its own keeps them
        id = re.sub("^call_", "toolu_", piece.call_id)
        return {"type": "tool_use", "id": id, "name": piece.name, "input": {}}
    if piece.kind == "thought":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _fill(block: dict[str, Any], text: str) -> None:
    if block["type"] == "text":
        block["text"] = text
    elif block["type"] == "thinking":
        block["thinking"], block["signature"] = text, uuid4().hex
    else:
        try:
            block["input"] = msgspec.json.decode(text or "{}")
        except msgspec.DecodeError:  # cut off, as the stop_reason says
            block["input"] = {}


def _delta(piece: Piece) -> dict[str, str]:
    if piece.kind == "call":
        return {"type": "input_json_delta", "partial_json": piece.text}
    if piece.kind == "thought":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "text_delta", "text": piece.text}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """All input tokens are of one of three kinds; nothing is charged for keeping them."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        **{name: usage[name] for name in _BILL if name in usage},
    }


def _event(name: str, **fields: Any) -> bytes:
    return event(encode({"type": name, **fields}), name)
