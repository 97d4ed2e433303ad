"""Logprobs in the shapes of the two APIs.

    chat         {"content": [{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", …}]}]}
    completions  {"tokens": […], "token_logprobs": […], "top_logprobs": [{…}], "text_offset": […]}

It knows decoded logprobs; it does not know how they were computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Raw
from msgspec.json import encode

from penstock.text.output import DecodedLogprob


def array(items: Iterable[object]) -> Raw:
    """The JSON array of what `items` yields, each encoded as it comes: together, as Python objects, the
    logprobs of a long answer take many times the memory."""
    return Raw(b"[" + b",".join(map(encode, items)) + b"]")


def chat_logprobs(entries: Iterable[DecodedLogprob], top: int, *, as_ids: bool) -> dict[str, Any]:
    """OpenAI's chat logprobs, with `top` alternatives (-1: all). `as_ids` writes tokens as `token_id:N`."""
    return {
        "content": array(
            {**_entry(entry, as_ids), "top_logprobs": [_entry(other, as_ids) for other in _first(entry, top)]}
            for entry in entries
        ),
        "refusal": None,
    }


class CompletionLogprobs:
    """Completion logprobs of one choice, piece by piece: text offsets go on where the last piece ended."""

    def __init__(self, top: int, *, as_ids: bool) -> None:
        self._top = top
        self._as_ids = as_ids
        self._offset = 0

    def piece(self, entries: Iterable[DecodedLogprob]) -> dict[str, Any]:
        """The next tokens."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[Raw | None] = []
        offsets: list[int] = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += entry.width
            tokens.append(_name(entry, self._as_ids))
            values.append(entry.logprob)
            if entry.logprob is None:
                tops.append(None)
                continue
            # the token itself is always there, also when it is not among the most probable
            top = {_name(other, self._as_ids): other.logprob for other in (entry, *_first(entry, self._top))}
            tops.append(Raw(encode(top)))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _first(entry: DecodedLogprob, top: int) -> Sequence[DecodedLogprob]:
    return entry.top if top < 0 else entry.top[:top]


def _entry(entry: DecodedLogprob, as_ids: bool) -> dict[str, Any]:
    name = _name(entry, as_ids)
    return {"token": name, "logprob": entry.logprob, "bytes": list(entry.token.encode())}


def _name(entry: DecodedLogprob, as_ids: bool) -> str:
    return f"token_id:{entry.token_id}" if as_ids else entry.token
