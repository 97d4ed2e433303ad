"""What the door relays: a path, where its prompt and its caps stand, and how its answers end and fail.

It knows the fields that the gateway reads or writes; everything else of a body goes through as it came.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import PenstockError
from penstock.http.dialects import messages_error, messages_error_event, responses_error_event
from penstock.http.errors import error_bytes
from penstock.http.sse import event


def has_line(events: bytes, start: bytes) -> bool:
    """Whether a line of whole events begins so. In the text of a JSON value no line begins."""
    return events.startswith(start) or b"\n" + start in events


def count_lines(events: bytes, start: bytes) -> int:
    """How many lines of whole events begin so."""
    return events.count(b"\n" + start) + events.startswith(start)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One POST endpoint that is metered."""

    path: str
    prompt: str
    """Field that prefixes are taken of."""
    caps: tuple[str, ...] = ()
    """Fields with the most tokens to generate, the first that is given counts; none: nothing is generated."""
    cap: str = ""
    """The one that is written where none is given."""
    metered: bool = True
    """Whether it uses a model. If not, there is no row."""
    lists: bool = False
    """Whether a list in `prompt` is as many prompts."""
    others: tuple[str, ...] = ()
    """Fields that may hold the prompts instead, for a chat template to write."""
    starts: bytes = b'"['
    """What an entry of these lists begins with that is a prompt; others are tokens, or messages, of one."""
    templated: bool = False
    """Whether a template, or words of the model's own, surround each prompt."""
    pairs: bool = False
    """Whether a text is read again with each one of a list."""
    usage_option: bool = False
    """Whether `stream_options.include_usage` is asked for."""
    streams: bool = True
    owned: bool = False
    """Whether its answers have ids that only their owner may use."""
    refused: tuple[str, ...] = ()
    """Fields that would escape the meter, or reach what belongs to others."""

    def error(self, error: PenstockError) -> bytes:
        """The body of an error."""
        return error_bytes(error)

    def error_event(self, error: PenstockError) -> bytes:
        """What ends a stream that has failed; nothing follows it."""
        return event(error_bytes(error))

    def ended(self, events: bytes) -> bool:
        """Whether the last of these events of a stream is the one that a whole stream ends with."""
        return has_line(events, b"data: [DONE]") or has_line(events, b"data:[DONE]")


class _Responses(Endpoint):
    """OpenAI's Responses: events have names, and the last one says how it went."""

    def error_event(self, error: PenstockError) -> bytes:
        return responses_error_event(error)

    def ended(self, events: bytes) -> bool:
        return any(
            has_line(events, b"event: response." + last) or b'"type":"response.' + last in events
            for last in (b"completed", b"incomplete", b"failed", b"cancelled")
        )


class _Messages(Endpoint):
    """Anthropic's Messages."""

    def error(self, error: PenstockError) -> bytes:
        return messages_error(error)

    def error_event(self, error: PenstockError) -> bytes:
        return messages_error_event(error)

    def ended(self, events: bytes) -> bool:
        return has_line(events, b"event: message_stop") or b'"type":"message_stop"' in events


_CHAT_CAPS = ("max_completion_tokens", "max_tokens")

ENDPOINTS = (
    Endpoint("/v1/chat/completions", "messages", _CHAT_CAPS, "max_tokens", usage_option=True),
    Endpoint(
        "/v1/chat/completions/batch",
        "messages",
        _CHAT_CAPS,
        "max_tokens",
        lists=True,
        templated=True,
        streams=False,
    ),
    Endpoint("/v1/completions", "prompt", ("max_tokens",), "max_tokens", lists=True, usage_option=True),
    _Responses(
        "/v1/responses",
        "input",
        ("max_output_tokens",),
        "max_output_tokens",
        owned=True,
        refused=("background", "conversation"),
    ),
    _Messages("/v1/messages", "messages", ("max_tokens",), "max_tokens"),
    _Messages("/v1/messages/count_tokens", "messages", metered=False, streams=False),
    *(
        Endpoint(path, "input", lists=True, others=("messages",), streams=False)
        for path in ("/v1/embeddings", "/pooling", "/classify")
    ),
    Endpoint(
        "/v2/embed", "texts", lists=True, others=("inputs",), starts=b'"{', templated=True, streams=False
    ),
    *(Endpoint(path, "text_1", pairs=True, streams=False) for path in ("/v1/score", "/score")),
    *(Endpoint(path, "query", pairs=True, streams=False) for path in ("/v1/rerank", "/v2/rerank", "/rerank")),
    Endpoint("/tokenize", "prompt", metered=False, streams=False),
    Endpoint("/detokenize", "tokens", metered=False, streams=False),
)
"""All of them."""
