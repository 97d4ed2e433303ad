"""How the API is configured: one frozen dataclass, which adds the API's fields to those of the listener
and of `limits`.

It knows nothing of the engine's configuration. Names and defaults are vLLM's where vLLM has them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import StartupError
from penstock.http.config import as_tuple, at_least, option
from penstock.observe.names import parse_version
from penstock.text.parsers.families import REASONING_PARSERS, TOOL_PARSERS

from .limits import LimitConfig

MOST_API_SERVERS = 128
STRICT_LEVELS = ("auto", "function", "parameter")
"""Of --tool-strict-level, as vLLM's."""


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
    enable_auto_tool_choice: bool = option(
        False, "Let the model call tools where it wants to; needs --tool-call-parser."
    )
    tool_call_parser: str | None = option(
        None, "How the model writes calls: " + ", ".join(sorted(TOOL_PARSERS)) + "."
    )
    tool_strict_level: str = option(
        "auto",
        "Calls that a grammar forms: auto (of strict tools), function (all), parameter (and arguments).",
    )
    exclude_tools_when_tool_choice_none: bool = option(
        False, "Leave the tools of a request out of the prompt where tool_choice is none."
    )
    reasoning_parser: str | None = option(
        None, "How the model marks its reasoning: " + ", ".join(REASONING_PARSERS) + "."
    )
    reasoning_config: Mapping[str, Any] | None = option(
        None, "reasoning_end_str, which is generated where a thinking_token_budget is used up, as JSON."
    )
    chat_template_timeout: float = option(
        2.0,
        "Seconds that a chat template may run for one request, which is answered with 400 then.",
    )
    structured_outputs_config: Mapping[str, Any] | None = option(
        None, "backend (auto, guidance), disable_any_whitespace and more, as JSON, or one by one with a dot."
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
    max_stored_responses: int = option(
        1024, "Most responses that /v1/responses keeps in memory; 0 keeps none."
    )
    max_stored_response_bytes: int = option(
        64 * 1024 * 1024, "Most bytes that these take, with their conversations."
    )
    batch_dir: str | None = option(None, "Folder of /v1/files and /v1/batches; without it there are none.")
    max_file_bytes: int = option(200 * 1024 * 1024, "Largest file that /v1/files takes, in bytes.")
    max_batch_requests: int = option(50_000, "Most lines of a batch.")
    batch_concurrency: int = option(256, "Lines of batches that the engine has at a time.")
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
        _known("--tool-call-parser", self.tool_call_parser, TOOL_PARSERS)
        _known("--tool-strict-level", self.tool_strict_level, STRICT_LEVELS)
        _known("--reasoning-parser", self.reasoning_parser, REASONING_PARSERS)
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise StartupError(
                "--enable-auto-tool-choice needs --tool-call-parser.",
                param="--enable-auto-tool-choice",
                advice=f"Parsers are {', '.join(TOOL_PARSERS)}.",
            )
        _check_family(self)
        _check_structured_outputs(self.structured_outputs_config or {})
        _check_reasoning(self.reasoning_config or {}, self.reasoning_parser)
        at_least("--api-server-count", self.api_server_count, 1)
        if self.api_server_count > MOST_API_SERVERS:
            raise StartupError(
                f"--api-server-count must be at most {MOST_API_SERVERS}, got {self.api_server_count}.",
                param="--api-server-count",
                advice="More than one for each core gains nothing.",
            )
        at_least("--max-stored-responses", self.max_stored_responses, 0)
        at_least("--max-stored-response-bytes", self.max_stored_response_bytes, 1)
        for name in ("max_file_bytes", "max_batch_requests", "batch_concurrency"):
            at_least("--" + name.replace("_", "-"), getattr(self, name), 1)
        if self.batch_dir is not None and self.api_server_count > 1:
            raise StartupError(
                "--batch-dir needs --api-server-count 1: batches go on in one process.", param="--batch-dir"
            )
        at_least("--max-logprobs", self.max_logprobs, -1)
        if not 0.01 <= self.chat_template_timeout <= 3600:
            raise StartupError(
                f"--chat-template-timeout must be from 0.01 to 3600, got {self.chat_template_timeout:g}.",
                param="--chat-template-timeout",
            )
        at_least("--stream-interval", self.stream_interval, 1)


def _known(flag: str, name: str | None, names: Collection[str]) -> None:
    if name is not None and name not in names:
        raise StartupError(f"{flag} has no {name!r}.", param=flag, advice=f"It has {', '.join(names)}.")


def _check_family(config: ServerConfig) -> None:
    """Calls and thoughts that are read in one go together. Raises StartupError."""
    calls, thoughts = config.tool_call_parser, config.reasoning_parser
    families = {
        family.together: name for name, family in REASONING_PARSERS.items() if family.together is not None
    }
    own = families.get(TOOL_PARSERS[calls]) if calls else None
    if own is not None and thoughts is None:  # as vLLM does for gpt-oss
        object.__setattr__(config, "reasoning_parser", own)
    elif own != thoughts and (own is not None or (calls and thoughts in families.values())):
        raise StartupError(
            f"--tool-call-parser {calls} does not go with --reasoning-parser {thoughts}.",
            param="--reasoning-parser",
            advice="Models of the harmony format have openai and openai_gptoss, others neither.",
        )


_BACKENDS = {
    "auto": "",
    "guidance": "",
    "xgrammar": "it needs torch in the API process",
    "outlines": "guidance does what it does",
    "lm-format-enforcer": "guidance does what it does",
}
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "enable_in_reasoning")


def _check_structured_outputs(given: Mapping[str, Any]) -> None:
    """vLLM's StructuredOutputsConfig. Raises StartupError."""
    flag = "--structured-outputs-config"
    for name, value in given.items():
        where = f"{flag}.{name}"
        if name == "backend":
            if not isinstance(value, str) or _BACKENDS.get(value, "unknown"):
                why = _BACKENDS.get(value) if isinstance(value, str) else None
                raise StartupError(
                    f"{where} must be auto or guidance, got {value!r}{f' ({why})' if why else ''}.",
                    param=where,
                    advice="Leave it out: every kind of grammar is served.",
                )
        elif name in _OPTIONS:
            if not isinstance(value, bool):
                raise StartupError(f"{where} must be true or false, got {value!r}.", param=where)
        elif name in ("reasoning_parser", "reasoning_parser_plugin"):
            if value:
                raise StartupError(f"{where} is not read.", param=where, advice="Use --reasoning-parser.")
        else:
            raise StartupError(f"{flag} has no {name!r}; it has backend, {', '.join(_OPTIONS)}.", param=where)


def _check_reasoning(given: Mapping[str, Any], parser: str | None) -> None:
    """vLLM's ReasoningConfig. Raises StartupError."""
    flag = "--reasoning-config"
    family = REASONING_PARSERS.get(given.get("reasoning_parser") or parser or "")
    for name, value in given.items():
        where = f"{flag}.{name}"
        if name == "reasoning_parser":
            right, wanted = value in (None, "", parser), "what --reasoning-parser says"
        elif name == "reasoning_start_str":
            right, wanted = value in (None, "", family and family.start), "the parser's own"
        elif name == "reasoning_end_str":
            right = isinstance(value, str) and (not value or (family is not None and family.end in value))
            wanted = f"a text with {family.end} in it" if family else "left out without --reasoning-parser"
        else:
            raise StartupError(
                f"{flag} has no {name!r}; it has reasoning_start_str and reasoning_end_str.", param=where
            )
        if not right:
            raise StartupError(f"{where} must be {wanted}, got {value!r}.", param=where)
