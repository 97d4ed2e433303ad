"""POST /v1/responses: the request, and what answers look like, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import field

from penstock.server.fields import RESPONSES_NEUTRAL, Rule
from penstock.server.protocol import Request
from penstock.server.shapes import Count, Milliseconds

Truncation = Literal["auto", "disabled"]


class ResponsesRequest(Request, frozen=True, kw_only=True):
    """POST /v1/responses."""

    neutral: ClassVar[Mapping[str, Rule]] = RESPONSES_NEUTRAL

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    """By default, where the server keeps responses at all."""
    background: bool = False
    stream: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    include: list[str] = field(default_factory=list)
    max_output_tokens: int | None = None
    text: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] = field(default_factory=dict)
    truncation: Truncation = "disabled"
    """auto: what does not fit is cut off at the beginning of the prompt, as in vLLM."""
    top_logprobs: int = 0

    # ---- sampling, vLLM's additions among it ----
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.truncation == "auto":  # what the pipeline knows it as
            msgspec.structs.force_setattr(self, "truncate_prompt_tokens", -1)


class InputTokensDetails(msgspec.Struct):
    """Where the keys and values of input tokens came from."""

    cached_tokens: Count
    cache_write_tokens: Count


class OutputTokensDetails(msgspec.Struct):
    """What output tokens were for."""

    reasoning_tokens: Count


class ResponseUsage(msgspec.Struct):
    """Tokens, and the request's bill."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count
    device_seconds: float
    queue_ms: Milliseconds | None
    prefill_ms: Milliseconds | None
    ttft_ms: Milliseconds | None
    decode_ms: Milliseconds | None


class Response(msgspec.Struct, kw_only=True):
    """An answer, or one that is still to come."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Truncation
    usage: ResponseUsage | None


class ResponsesEvent(msgspec.Struct):
    """An event of a stream; its name is its type. More fields as the type has them."""

    type: str
    sequence_number: Count
    response: Response | None = None
    output_index: Count | None = None
    content_index: Count | None = None
    item_id: str | None = None
    item: dict[str, Any] | None = None
    part: dict[str, Any] | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None


class DeletedResponse(msgspec.Struct):
    """Of a response that is no longer there."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class InputTokens(msgspec.Struct):
    """Of what a response would be an answer to, as the chat template writes it."""

    input_tokens: Count
    object: Literal["response.input_tokens"] = "response.input_tokens"


class InputItems(msgspec.Struct):
    """A page of what a response was asked."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
