"""How the API is configured: one frozen dataclass, which adds the API's fields to those of the listener.

It knows nothing of the engine's configuration. Names and defaults are vLLM's where vLLM has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.http.config import HttpConfig, as_tuple, at_least, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(HttpConfig):
    """Configuration of the HTTP API. Raises StartupError, naming the flag, for values that cannot work."""

    served_model_name: tuple[str, ...] = option(
        (), "Names that requests may use for the model; the first stands in responses. Default: the model."
    )
    response_role: str = option("assistant", "Role of the messages that the model writes.")
    chat_template: str | None = option(
        None, "Chat template in place of the model's: a file, or the template itself."
    )
    trust_request_chat_template: bool = option(
        False, "Allow requests to bring a chat template of their own (`chat_template`)."
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
    enable_log_requests: bool = option(
        False, "Log a line for every request: id, token counts, parameters; never its text."
    )

    def __post_init__(self) -> None:
        HttpConfig.__post_init__(self)  # super() does not find its class where slots=True has replaced it
        as_tuple(self, "served_model_name")
        at_least("--max-logprobs", self.max_logprobs, -1)
        at_least("--stream-interval", self.stream_interval, 1)
