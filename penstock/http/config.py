"""How an HTTP process listens: one frozen dataclass, documented where each field is defined.

Command line flags are generated from it (`field_name` → `--field-name`, `metadata["help"]` → its help line).
It knows nothing of what is served: a subclass adds that. Names and defaults are vLLM's where vLLM has them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from penstock.core.errors import StartupError, quote

_FORMATS = ("text", "json")
_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def option(default: Any, help: str) -> Any:
    """A field with its default and its help line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Configuration of a listener. Raises StartupError, naming the flag, for values that cannot work."""

    host: str = option("0.0.0.0", "Address to listen on; 127.0.0.1 serves this machine only.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    uds: str | None = option(
        None, "Unix socket to listen on in place of an address and a port; its file is removed at the end."
    )
    api_key: tuple[str, ...] = option(
        (), "Keys that clients may present as `Authorization: Bearer KEY`; none means no authentication."
    )
    max_body_bytes: int = option(
        10 * 1024 * 1024, "Largest request body in bytes; more is answered with 413."
    )
    max_header_bytes: int = option(
        64 * 1024, "Largest request line with headers in bytes; more is answered with 431, or 414."
    )
    max_header_count: int = option(256, "Most headers of a request; more are answered with 431.")
    max_connections: int = option(
        10_000,
        "Most open connections, as far as the limit of open files (`ulimit -n`) allows.",
    )
    max_connections_per_client: int = option(
        0,
        "Most connections of one address (behind --trusted-proxies: requests); 0 is no limit.",
    )
    trusted_proxies: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Networks, as 10.0.0.0/8, or `unix`, whose X-Forwarded-For or Forwarded says "
            "who the client is.",
            "metavar": "NETWORK",
        },
    )
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests get to finish after SIGTERM; 0 aborts them at once."
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origins that browsers may call from (CORS), as https://example.org, or *; default is none."
    )
    allowed_methods: tuple[str, ...] = option(("*",), "Methods that browsers may use (CORS).")
    allowed_headers: tuple[str, ...] = option(("*",), "Headers that browsers may send (CORS).")
    allow_credentials: bool = option(False, "Let browsers send credentials (CORS).")
    root_path: str = option("", "Path under which a proxy publishes this server, such as /llm.")
    ssl_keyfile: str | None = option(None, "Private key file (PEM) to serve HTTPS.")
    ssl_certfile: str | None = option(None, "Certificate file (PEM) to serve HTTPS.")
    ssl_ca_certs: str | None = option(None, "File of certificate authorities (PEM) for client certificates.")
    enable_ssl_refresh: bool = option(
        False, "Read the TLS files again when they change, for new connections; SIGHUP does so in any case."
    )
    ssl_cert_reqs: int = option(0, "Client certificates: 0 none, 1 optional, 2 required.")
    timeout_keep_alive: int = option(
        5, "Seconds that a connection is kept open on which no request has begun, a new one as well."
    )
    timeout_headers: float = option(
        10.0, "Seconds from the first byte of a request to the end of its headers; then 408."
    )
    timeout_body: float = option(60.0, "Seconds that the body of a request may take to arrive; then 408.")
    timeout_send: float = option(
        60.0, "Seconds after which a client that takes nothing of its answer is cut off."
    )
    uvicorn_log_level: str = option("info", f"Log level of the HTTP server: {', '.join(_LEVELS)}.")
    log_format: str = option("text", f"Format of all logs: {' or '.join(_FORMATS)}, one object a line.")
    disable_uvicorn_access_log: bool = option(False, "Do not log a line for every HTTP request.")
    disable_access_log_for_endpoints: str | None = option(
        None, "Paths whose requests are not logged, with commas between them: /v1/models,/version."
    )
    enable_access_log_for_probes: bool = option(
        False, "Log requests of probes and scrapers, too: /health, /livez, /readyz, /ping, /metrics, /load."
    )
    enable_request_id_headers: bool = option(
        True, "Answer with an `X-Request-Id` header; the client's own is kept."
    )

    def __post_init__(self) -> None:
        for name in ("api_key", "allowed_origins", "allowed_methods", "allowed_headers", "trusted_proxies"):
            as_tuple(self, name)
        object.__setattr__(self, "allowed_origins", tuple(filter(None, self.allowed_origins)))
        at_least("--port", self.port, 0)
        if self.port > 65535:
            raise StartupError(f"--port must be at most 65535, got {self.port}.", param="--port")
        at_least("--max-body-bytes", self.max_body_bytes, 1)
        at_least("--max-header-bytes", self.max_header_bytes, 1024)
        at_least("--max-header-count", self.max_header_count, 16)
        at_least("--max-connections", self.max_connections, 1)
        at_least("--max-connections-per-client", self.max_connections_per_client, 0)
        at_least("--timeout-headers", self.timeout_headers, 0.1)
        at_least("--timeout-body", self.timeout_body, 0.1)
        at_least("--timeout-send", self.timeout_send, 0.1)
        at_least("--shutdown-timeout", self.shutdown_timeout, 0)
        at_least("--timeout-keep-alive", self.timeout_keep_alive, 0)
        if any(not key.strip() for key in self.api_key):
            raise StartupError("--api-key must not be empty.", param="--api-key")
        if self.uds == "":
            raise StartupError("--uds must not be empty.", param="--uds")
        if self.uvicorn_log_level not in _LEVELS:
            raise StartupError(
                f"--uvicorn-log-level must be one of {', '.join(_LEVELS)}, got {self.uvicorn_log_level!r}.",
                param="--uvicorn-log-level",
            )
        if self.log_format not in _FORMATS:
            raise StartupError(
                f"--log-format must be one of {', '.join(_FORMATS)}, got {self.log_format!r}.",
                param="--log-format",
            )
        for proxy in self.trusted_proxies:
            if not is_network(proxy):
                raise StartupError(
                    f"--trusted-proxies: {quote(proxy)} is no address and no network.",
                    param="--trusted-proxies",
                    advice="Write 10.0.0.0/8, 192.0.2.1, or unix.",
                )
        if self.root_path and not self.root_path.startswith("/"):
            raise StartupError(f"--root-path must start with /, got {self.root_path!r}.", param="--root-path")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise StartupError(
                "--ssl-keyfile and --ssl-certfile belong together, only one is given.", param="--ssl-certfile"
            )


def is_network(text: str) -> bool:
    """Whether it says whom to trust: an address, a network, or `unix`."""
    try:
        return text == "unix" or bool(ipaddress.ip_network(text, strict=False))
    except ValueError:
        return False


def as_tuple(config: HttpConfig, name: str) -> None:
    """Make a field a tuple: a single text is a tuple of one."""
    value = getattr(config, name)
    if not isinstance(value, tuple):
        object.__setattr__(config, name, (value,) if isinstance(value, str) else tuple(value))


def at_least(flag: str, value: float, low: float) -> None:
    """Raise StartupError, naming the flag, for a value below `low`."""
    if value < low:
        raise StartupError(f"{flag} must be at least {low:g}, got {value:g}.", param=flag)
