"""How the HTTP API is configured: one frozen dataclass, documented where each field is defined.

Command line flags are generated from it (`field_name` → `--field-name`, `metadata["help"]` → its help line).
It knows nothing of the engine's configuration. Names and defaults are vLLM's where vLLM has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penstock.core.errors import StartupError

_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Configuration of the HTTP API. Raises StartupError, naming the flag, for values that cannot work."""

    host: str = _option("0.0.0.0", "Address to listen on; 127.0.0.1 serves this machine only.")
    port: int = _option(8000, "Port to listen on; 0 takes a free one.")
    api_key: tuple[str, ...] = _option(
        (), "Keys that clients may present as `Authorization: Bearer KEY`; none means no authentication."
    )
    served_model_name: tuple[str, ...] = _option(
        (), "Names that requests may use for the model; the first stands in responses. Default: the model."
    )
    response_role: str = _option("assistant", "Role of the messages that the model writes.")
    chat_template: str | None = _option(
        None, "Chat template in place of the model's: a file, or the template itself."
    )
    trust_request_chat_template: bool = _option(
        False, "Allow requests to bring a chat template of their own (`chat_template`)."
    )
    max_logprobs: int = _option(
        20, "Most alternatives per token that `logprobs` and `top_logprobs` may ask for; -1 is no limit."
    )
    stream_interval: int = _option(
        1, "Tokens per streamed chunk; the first and the last chunk are sent at once."
    )
    max_body_bytes: int = _option(
        10 * 1024 * 1024, "Largest request body in bytes; more is answered with 413."
    )
    shutdown_timeout: float = _option(
        30.0, "Seconds that running requests get to finish after SIGTERM; 0 aborts them at once."
    )
    allowed_origins: tuple[str, ...] = _option(
        ("*",), "Origins that browsers may call from (CORS), as https://example.org; '' allows none."
    )
    allowed_methods: tuple[str, ...] = _option(("*",), "Methods that browsers may use (CORS).")
    allowed_headers: tuple[str, ...] = _option(("*",), "Headers that browsers may send (CORS).")
    allow_credentials: bool = _option(False, "Let browsers send credentials (CORS).")
    root_path: str = _option("", "Path under which a proxy publishes this server, such as /llm.")
    ssl_keyfile: str | None = _option(None, "Private key file (PEM) to serve HTTPS.")
    ssl_certfile: str | None = _option(None, "Certificate file (PEM) to serve HTTPS.")
    ssl_ca_certs: str | None = _option(None, "File of certificate authorities (PEM) for client certificates.")
    ssl_cert_reqs: int = _option(0, "Client certificates: 0 none, 1 optional, 2 required.")
    timeout_keep_alive: int = _option(5, "Seconds that an idle connection is kept open.")
    uvicorn_log_level: str = _option("info", f"Log level of the HTTP server: {', '.join(_LEVELS)}.")
    disable_uvicorn_access_log: bool = _option(False, "Do not log a line for every HTTP request.")
    return_tokens_as_token_ids: bool = _option(
        False, "Write tokens in logprobs as `token_id:N`, where a request does not say otherwise."
    )
    enable_force_include_usage: bool = _option(
        False, "End every stream with the usage, as if stream_options.include_usage were set."
    )
    enable_log_requests: bool = _option(
        False, "Log a line for every request: id, token counts, parameters; never its text."
    )
    enable_request_id_headers: bool = _option(
        True, "Answer with an `X-Request-Id` header; the client's own is kept."
    )

    def __post_init__(self) -> None:
        for name in ("api_key", "served_model_name", "allowed_origins", "allowed_methods", "allowed_headers"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "allowed_origins", tuple(filter(None, self.allowed_origins)))
        _at_least("--port", self.port, 0)
        if self.port > 65535:
            raise StartupError(f"--port must be at most 65535, got {self.port}.", param="--port")
        _at_least("--max-logprobs", self.max_logprobs, -1)
        _at_least("--stream-interval", self.stream_interval, 1)
        _at_least("--max-body-bytes", self.max_body_bytes, 1)
        _at_least("--shutdown-timeout", self.shutdown_timeout, 0)
        _at_least("--timeout-keep-alive", self.timeout_keep_alive, 0)
        if any(not key.strip() for key in self.api_key):
            raise StartupError("--api-key must not be empty.", param="--api-key")
        if self.uvicorn_log_level not in _LEVELS:
            raise StartupError(
                f"--uvicorn-log-level must be one of {', '.join(_LEVELS)}, got {self.uvicorn_log_level!r}.",
                param="--uvicorn-log-level",
            )
        if self.root_path and not self.root_path.startswith("/"):
            raise StartupError(f"--root-path must start with /, got {self.root_path!r}.", param="--root-path")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise StartupError(
                "--ssl-keyfile and --ssl-certfile belong together, only one is given.", param="--ssl-certfile"
            )


def _at_least(flag: str, value: float, low: float) -> None:
    if value < low:
        raise StartupError(f"{flag} must be at least {low:g}, got {value:g}.", param=flag)
