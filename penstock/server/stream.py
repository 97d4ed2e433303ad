"""Chunks of OpenAI streams, made of constant bytes around a few encoded values.

Per token there is little to do: the id, the model and everything else that stays the same is encoded once,
when the stream begins. It knows the wire format of chunks; it does not know where the deltas come from.

    data: {"id":…,"object":…,"created":…,"model":…,"system_fingerprint":…,"choices":[    head
        {"index":0,                                                                      one per choice
        "delta":{"content":"…"},                                                         body
        "logprobs":null,"finish_reason":null                                             rest
        }],"usage":null}                                                                 tail
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.json import encode

_QUIET_REST = b',"logprobs":null,"finish_reason":null'


class ChunkFormat:
    """The constant parts of one stream's chunks."""

    def __init__(self, head: Mapping[str, Any], *, null_usage: bool) -> None:
        """Encode them.

        Args:
            head: the fields before `choices`.
            null_usage: whether chunks say `"usage":null`, as OpenAI does when usage ends the stream.
        """
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if null_usage else b"]}\n\n"
        self._indices: dict[int, bytes] = {}

    def chunk(
        self,
        index: int,
        body: bytes,
        *,
        rest: Mapping[str, Any] | None = None,
        usage: Mapping[str, Any] | None = None,
        top: Mapping[str, Any] | None = None,
    ) -> bytes:
        """One chunk with one choice.

        Args:
            body: the choice's encoded text fields, such as `"delta":{"content":"Hi"}`.
            rest: fields of the choice after it; None says that logprobs and finish_reason are null.
            usage: counts so far, for continuous_usage_stats.
            top: more fields of the chunk itself.
        """
        start = self._indices.get(index)
        if start is None:
            start = self._indices[index] = self._head + b'{"index":%d,' % index
        after = _QUIET_REST if rest is None else b"," + encode(rest)[1:-1]
        tail = self._tail if usage is None else b'],"usage":' + encode(usage) + b"}\n\n"
        if top:
            tail = b"]," + encode(top)[1:-1] + tail[1:]
        return b"".join((start, body, after, b"}", tail))

    def usage_chunk(self, usage: Mapping[str, Any]) -> bytes:
        """The last chunk: empty choices, and the usage."""
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"
