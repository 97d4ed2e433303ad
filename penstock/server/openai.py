"""What OpenAI's two generating APIs write alike: the head of an answer, its usage, and chunks.

Chunks are constant bytes around a few encoded values. Per token there is little to do: the id, the model and
everything else that stays the same is encoded once, when the stream begins. This module knows what surrounds
a choice; `chat` and `completions` know what is in it.

    data: {"id":…,"object":…,"created":…,"model":…,"system_fingerprint":…,"choices":[    head
        {"index":0,                                                                      one per choice
        "delta":{"content":"…"},                                                         body
        "logprobs":null,"finish_reason":null                                             rest
        }],"usage":null}                                                                 tail
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec.json import encode

from penstock.core.errors import PenstockError
from penstock.http.errors import error_bytes
from penstock.http.sse import END, event

from .generation import Choice, Generation
from .protocol import GenerateRequest
from .state import State

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


class OpenAIFormat:
    """The part of a Format that does not depend on the API."""

    marks: tuple[str, ...] = ()
    pools = False

    def error(self, error: PenstockError) -> bytes:
        """See Format."""
        return error_bytes(error)


class OpenAIWriter:
    """The part of a Writer that does not depend on the API."""

    object: str
    """Of a whole answer."""
    chunk_object: str

    def __init__(self, state: State, request: GenerateRequest, id: str) -> None:
        options = request.stream_options
        self._streams = request.stream
        self.interval = max(state.config.stream_interval, request.stream_interval or 1)
        self._include_usage = state.config.enable_force_include_usage or (
            options is not None and bool(options.include_usage)
        )
        self._continuous = state.config.enable_force_include_usage or (
            self._include_usage and options is not None and bool(options.continuous_usage_stats)
        )
        self._head = {
            "id": id,
            "object": self.chunk_object if self._streams else self.object,
            "created": int(state.wall()),
            "model": state.model_name,
            "system_fingerprint": state.fingerprint,
        }
        self._form = ChunkFormat(self._head, null_usage=self._include_usage)

    def ending(self, generation: Generation) -> bytes:
        """See Writer."""
        return self._form.usage_chunk(generation.usage()) + END if self._include_usage else END

    def error(self, error: PenstockError) -> bytes:
        """See Writer. No [DONE] follows: the stream is not whole, whatever a client makes of the error."""
        return event(error_bytes(error))

    def _answer(
        self, generation: Generation, choices: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> Iterator[bytes]:
        """A whole answer, in pieces: one for each choice."""
        yield encode(self._head)[:-1] + b',"choices":['
        for number, choice in enumerate(choices):
            yield b"," + encode(choice) if number else encode(choice)
        yield b"]," + encode({**fields, "usage": generation.usage()})[1:]

    def _usage(self, choice: Choice, generated: int) -> dict[str, Any] | None:
        """One choice's usage so far, as vLLM's continuous_usage_stats counts it, where it is wanted."""
        if not self._continuous:
            return None
        prompt_tokens = len(choice.prompt.ids)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        }
