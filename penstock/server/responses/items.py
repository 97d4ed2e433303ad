"""From the pieces of an answer to the items of a response, and the events that tell of them as they grow.

    response.output_item.added
      response.content_part.added                       of a message or a thought
        response.output_text.delta …                    or reasoning_text, or function_call_arguments
      response.output_text.done · response.content_part.done
    response.output_item.done

One item is open at a time; a piece of another kind closes it. Whole answers are made in the same way, by
whoever leaves the events unread. It knows neither requests nor how events are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from penstock.server.pieces import Piece

Event = tuple[str, dict[str, Any]]
"""(type, fields)"""

_ITEMS = {"text": "message", "thought": "reasoning", "call": "function_call"}
_PREFIXES = {"text": "msg", "thought": "rs", "call": "fc"}


class Items:
    """The output of one response."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: tuple[str, int] | None = None
        """Kind and number of the item that more may be added to."""
        self._item: dict[str, Any] = {}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, piece: Piece, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """Take in some more; logprobs: of the tokens of a text."""
        if self._open != (piece.kind, piece.call):
            yield from self.close()
            yield from self._begin(piece)
        self._texts.append(piece.text)
        self._logprobs += logprobs
        if not piece.text and not logprobs:
            return
        if piece.kind == "call":
            yield "response.function_call_arguments.delta", {**self._place(), "delta": piece.text}
        elif piece.kind == "thought":
            yield "response.reasoning_text.delta", {**self._place(0), "delta": piece.text}
        else:
            fields = {**self._place(0), "delta": piece.text, "logprobs": list(logprobs)}
            yield "response.output_text.delta", fields

    def close(self, status: str = "completed") -> Iterator[Event]:
        """The open item, if there is one, gets no more."""
        if self._open is None:
            return
        kind, text, item = self._open[0], "".join(self._texts), self._item
        if kind == "call":
            item["arguments"] = text
            fields = {**self._place(), "name": item["name"], "arguments": text}
            yield "response.function_call_arguments.done", fields
        else:
            part = self._part(text)
            if kind == "thought":
                yield "response.reasoning_text.done", {**self._place(0), "text": text}
            else:
                fields = {**self._place(0), "text": text, "logprobs": part["logprobs"]}
                yield "response.output_text.done", fields
            yield "response.content_part.done", {**self._place(0), "part": part}
            item["content"] = [part]
        item["status"] = status
        yield "response.output_item.done", {"output_index": len(self.done), "item": dict(item)}
        self.done.append(item)
        self._open = None

    def _begin(self, piece: Piece) -> Iterator[Event]:
        self._open, self._texts, self._logprobs = (piece.kind, piece.call), [], []
        self._item = {
            "id": f"{_PREFIXES[piece.kind]}_{uuid4().hex}",
            "type": _ITEMS[piece.kind],
            "status": "in_progress",
        }
        if piece.kind == "call":
            self._item |= {"call_id": piece.call_id, "name": piece.name, "arguments": ""}
        elif piece.kind == "thought":
            self._item |= {"summary": [], "content": [], "encrypted_content": None}
        else:
            self._item |= {"role": "assistant", "content": []}
        yield "response.output_item.added", {"output_index": len(self.done), "item": dict(self._item)}
        if piece.kind != "call":
            yield "response.content_part.added", {**self._place(0), "part": self._part("")}

    def _part(self, text: str) -> dict[str, Any]:
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._item["id"], "output_index": len(self.done)}
        return place if content_index is None else {**place, "content_index": content_index}


def said(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The items as one message of a chat, for whoever goes on with it."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for item in items:
        if item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        else:
            name = "content" if item["type"] == "message" else "reasoning"
            text = "".join(part["text"] for part in item["content"])
            message[name] = message.get(name, "") + text
    return message
