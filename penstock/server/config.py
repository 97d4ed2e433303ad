"""How the API is configured: one frozen dataclass, which adds the API's fields to those of the listener
and of `limits`.

It knows nothing of the engine's configuration. Names and defaults are vLLM's where vLLM has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import StartupError
from penstock.http.config import as_tuple, at_least, option
from penstock.observe.names import parse_version

from .limits import LimitConfig

MOST_API_SERVERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(LimitConfig):
    """Configuration of the HTTP API. Raises StartupError, naming the flag, for values that cannot work."""

    api_server_count: int = option(
        1, "API processes before the engine, for many short requests; each takes memory of its own."
    )
    served_model_name: tuple[str, ...] = option(
        (), "Names that requests may use for the model; the first stands in responses. Default: the model."
    )
    response_role: str = option("assistant", "Role of the messages that the model writes.")
    chat_template: str | None = option(
        None, "Chat template in place of the model's: a file, or the template itself."
    )
    default_chat_template_kwargs: Mapping[str, Any] | None = option(
        None, "Variables for the chat template, as JSON, where a request's chat_template_kwargs say nothing."
    )
    trust_request_chat_template: bool = option(
        False, "Allow requests to bring a chat template of their own (`chat_template`)."
    )
    chat_template_timeout: float = option(
        2.0,
        "Seconds that a chat template may run for one request, which is answered with 400 then.",
    )
    max_logprobs: int = option(
        20, "Most alternatives per token that `logprobs` and `top_logprobs` may ask for; -1 is no limit."
    )
    stream_interval: int = option(
        1, "Tokens per streamed chunk; the first and the last chunk are sent at once."
    )
    return_tokens_as_token_ids: bool = option(
        False, "Write tokens in logprobs as `token_id:N`, where a request does not say otherwise."
    )
    enable_force_include_usage: bool = option(
        False, "End every stream with the usage, and put it into every chunk, whatever stream_options says."
    )
    enable_tokenizer_info_endpoint: bool = option(
        False, "Serve /tokenizer_info: the tokenizer's configuration, the chat template included."
    )
    disable_fastapi_docs: bool = option(
        False, "Serve no description of the API: neither /openapi.json nor /docs."
    )
    show_hidden_metrics_for_version: str | None = option(
        None, "A version of vLLM, such as 0.10, whose old names of metrics are shown beside today's."
    )
    gateway_key: tuple[str, ...] = option(
        (), "Keys of gateways: who presents one may speak for tenants, and reads the bills (/v1/bills)."
    )
    strict_fields: bool = option(
        False,
        "Refuse unknown fields of requests, instead of naming them in X-Penstock-Ignored.",
    )
    enable_log_requests: bool = option(
        False, "Log a line for every request: id, token counts, parameters; never its text."
    )

    def __post_init__(self) -> None:
        LimitConfig.__post_init__(self)  # super() does not find its class where slots=True has replaced it
        for name in ("served_model_name", "gateway_key"):
            as_tuple(self, name)
        if any(not key.strip() for key in self.gateway_key):
            raise StartupError("--gateway-key must not be empty.", param="--gateway-key")
        if self.gateway_key and self.api_server_count > 1:
            raise StartupError(
                "--gateway-key needs --api-server-count 1: each API process has the bills of its requests.",
                param="--gateway-key",
            )
        for name in ("chat_template", "messages"):
            if name in (self.default_chat_template_kwargs or {}):
                raise StartupError(
                    f"--default-chat-template-kwargs must not contain {name!r}.",
                    param="--default-chat-template-kwargs",
                )
        if (version := self.show_hidden_metrics_for_version) is not None:
            try:
                parse_version(version)
            except ValueError as error:
                flag = "--show-hidden-metrics-for-version"
                raise StartupError(f"{flag} {error}.", param=flag) from None
        at_least("--api-server-count", self.api_server_count, 1)
        if self.api_server_count > MOST_API_SERVERS:
            raise StartupError(
                f"--api-server-count must be at most {MOST_API_SERVERS}, got {self.api_server_count}.",
                param="--api-server-count",
                advice="More than one for each core gains nothing.",
            )
        at_least("--max-logprobs", self.max_logprobs, -1)
        if not 0.01 <= self.chat_template_timeout <= 3600:
            raise StartupError(
                f"--chat-template-timeout must be from 0.01 to 3600, got {self.chat_template_timeout:g}.",
                param="--chat-template-timeout",
            )
        at_least("--stream-interval", self.stream_interval, 1)
