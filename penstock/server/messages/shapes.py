"""POST /v1/messages and /v1/messages/count_tokens: the requests, and what answers look like, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from penstock.server.fields import MESSAGES_NEUTRAL, Rule
from penstock.server.protocol import Request
from penstock.server.shapes import Count, Milliseconds


class _Conversation(Request, frozen=True, kw_only=True):
    """What a request generates from, and what it counts."""

    neutral: ClassVar[Mapping[str, Rule]] = MESSAGES_NEUTRAL

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] = ""
    add_special_tokens: bool = False
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tool_choice: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] = msgspec.field(default_factory=dict)
    output_format: dict[str, Any] | None = None
    """output_config.format, as clients wrote it before there was output_config."""
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class CountTokensRequest(_Conversation, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(_Conversation, frozen=True, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] = msgspec.field(default_factory=list)
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class TokenCount(msgspec.Struct):
    """Of a conversation, as the chat template writes it."""

    input_tokens: Count


class MessagesUsage(msgspec.Struct):
    """Tokens, and the request's bill. A prompt has all three kinds of input tokens together."""

    input_tokens: Count
    output_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count
    device_seconds: float | None = None
    queue_ms: Milliseconds | None = None
    prefill_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    decode_ms: Milliseconds | None = None


class ContentBlock(msgspec.Struct):
    """A text, a thought, or a call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class Message(msgspec.Struct):
    """A whole answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessagesEvent(msgspec.Struct):
    """An event of a stream; its name is its type."""

    type: str
    message: Message | None = None
    index: Count | None = None
    content_block: ContentBlock | None = None
    delta: dict[str, Any] | None = None
    usage: MessagesUsage | None = None


class MessagesErrorDetail(msgspec.Struct):
    """What happened, and what to do about it."""

    type: str
    message: str


class MessagesError(msgspec.Struct):
    """Anthropic's shape of an error."""

    type: Literal["error"]
    error: MessagesErrorDetail
