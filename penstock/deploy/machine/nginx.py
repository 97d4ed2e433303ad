"""nginx in front of a gateway: its configuration as typed directives, and the text of those.

    Directive("proxy_buffering", "off")                      proxy_buffering off;
    Directive("location", "/v1/", block=(…))                 location /v1/ { … }

Quoting is nginx's: an argument with a space, a quote, a brace or a semicolon is quoted. Directives and their
meaning: https://nginx.org/en/docs/dirindex.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .proxy import ERRORS, HIDDEN, Proxy

_PLAIN = re.compile(r"""[^\s;{}"'\\#]+""")
_VARIABLE = re.compile(r"\$\{\w+\}")


@dataclass(frozen=True, slots=True, init=False)
class Directive:
    """One directive, with what is in its braces if it has some."""

    name: str
    arguments: tuple[str, ...]
    block: tuple[Directive, ...] | None

    def __init__(self, name: str, *arguments: str | int, block: Iterable[Directive] | None = None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "arguments", tuple(map(str, arguments)))
        object.__setattr__(self, "block", None if block is None else tuple(block))


def text(directives: Iterable[Directive]) -> str:
    """The file."""
    return "".join(f"{line}\n" for line in _lines(directives, 0))


def _lines(directives: Iterable[Directive], depth: int) -> Iterator[str]:
    for each in directives:
        head = "    " * depth + " ".join([each.name, *map(_quoted, each.arguments)])
        if each.block is None:
            yield f"{head};"
        else:
            yield f"{head} {{"
            yield from _lines(each.block, depth + 1)
            yield "    " * depth + "}"


def _quoted(argument: str) -> str:
    if _PLAIN.fullmatch(_VARIABLE.sub("v", argument)):
        return argument
    return '"' + argument.replace("\\", "\\\\").replace('"', '\\"') + '"'


D = Directive


def configuration(proxy: Proxy, *, run: str, log: str = "/dev/stderr", access: str = "/dev/stdout") -> str:
    """The whole nginx.conf. `run`: a folder that it may write, for its process id and for bodies."""
    return text(
        (
            D("pid", f"{run}/nginx.pid"),
            D("worker_processes", "auto"),
            D("error_log", log, "warn"),
            # a reload lets workers end their streams, as long as one may take
            D("worker_shutdown_timeout", f"{proxy.idle_timeout}s"),
            D("events", block=(D("worker_connections", 8192),)),
            D("http", block=_http(proxy, run, access)),
        )
    )


def _http(proxy: Proxy, run: str, access: str) -> Iterator[Directive]:
    yield D("default_type", "application/octet-stream")
    # without query strings, which may hold what nobody should log
    yield D(
        "log_format",
        "penstock",
        '$remote_addr [$time_iso8601] "$request_method $uri" $status $body_bytes_sent '
        "$request_time $upstream_response_time $request_id",
    )
    yield D("access_log", access, "penstock")
    yield D("server_tokens", "off")
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        yield D(f"{kind}_temp_path", f"{run}/{kind}")
    yield D("limit_req_zone", "$binary_remote_addr", "zone=requests:10m", f"rate={proxy.rate}r/s")
    yield D("limit_conn_zone", "$binary_remote_addr", "zone=connections:10m")
    yield D("limit_req_status", 429)
    yield D("limit_conn_status", 429)
    if proxy.resolver is not None:
        # a container that is made anew has another address
        yield D("resolver", proxy.resolver, "valid=5s", "ipv6=off")
    else:
        yield D("upstream", "gateway", block=_connections(proxy))
    port_part = "" if proxy.public_port == 443 else f":{proxy.public_port}"
    yield D(
        "server",
        block=(
            *_listen(proxy, proxy.http_port),
            D("server_name", proxy.host or "_"),
            # 308 keeps a POST a POST; but a key has been on the wire by then: tell clients of https://
            D("return", 308, f"https://$host{port_part}$request_uri"),
        ),
    )
    yield D("server", block=_server(proxy))


def _connections(proxy: Proxy) -> Iterator[Directive]:
    host, port = proxy.gateway
    yield D("server", f"{host}:{port}", "max_fails=0")
    yield D("keepalive", 64)
    # below the gateway's own --timeout-keep-alive: no connection is used while it is being closed
    yield D("keepalive_timeout", "4s")


def _listen(proxy: Proxy, port: int, *more: str) -> tuple[Directive, ...]:
    everywhere = (D("listen", port, *more), D("listen", f"[::]:{port}", *more))
    return everywhere if proxy.ipv6 else everywhere[:1]


def _server(proxy: Proxy) -> Iterator[Directive]:
    yield from _listen(proxy, proxy.https_port, "ssl", "http2")
    yield D("server_name", proxy.host or "_")
    yield D("ssl_certificate", proxy.certificate)
    yield D("ssl_certificate_key", proxy.key)
    yield D("ssl_protocols", "TLSv1.2", "TLSv1.3")
    yield D("ssl_session_cache", "shared:tls:10m")
    yield D("ssl_session_tickets", "off")
    yield D("add_header", "Strict-Transport-Security", "max-age=31536000", "always")
    yield D("client_max_body_size", proxy.max_body)
    yield D("client_header_timeout", "10s")
    yield D("client_body_timeout", "60s")
    yield D("limit_req", "zone=requests", f"burst={2 * proxy.rate}", "nodelay")
    yield D("limit_conn", "connections", proxy.connections)
    for status in ERRORS:
        yield D("error_page", status, f"@{status}")
        yield D(
            "location",
            f"@{status}",
            block=(
                D("internal"),
                D("default_type", "application/json"),
                *((D("add_header", "Retry-After", 1, "always"),) if status in (429, 502) else ()),
                D("return", status, ERRORS[status]),
            ),
        )
    for path in HIDDEN:
        yield D("location", "^~", path, block=(D("return", 404),))
    # uploads go on as they come: they are larger than what should lie here twice
    files = (D("client_max_body_size", proxy.max_file), D("proxy_request_buffering", "off"))
    yield D("location", "^~", "/v1/files", block=(*files, *_pass(proxy)))
    yield D("location", "/", block=_pass(proxy))


def _pass(proxy: Proxy) -> tuple[Directive, ...]:
    idle = f"{proxy.idle_timeout}s"
    host, port = proxy.gateway
    # a variable, so that the name is looked up again
    by_name = (D("set", "$gateway", f"http://{host}:{port}"), D("proxy_pass", "$gateway"))
    return (
        *(by_name if proxy.resolver is not None else (D("proxy_pass", "http://gateway"),)),
        D("proxy_http_version", "1.1"),
        D("proxy_set_header", "Connection", ""),
        D("proxy_set_header", "Host", "$host"),
        # replaced, not appended to: what the client says of itself is not believed
        D("proxy_set_header", "X-Forwarded-For", "$remote_addr"),
        D("proxy_set_header", "X-Forwarded-Proto", "$scheme"),
        # tokens go on one by one; a chunk that waits in a buffer is a token that nobody sees
        D("proxy_buffering", "off"),
        D("proxy_cache", "off"),
        D("gzip", "off"),
        D("proxy_connect_timeout", "5s"),
        D("proxy_read_timeout", idle),
        D("proxy_send_timeout", idle),
        D("send_timeout", idle),
        # the gateway tries others itself; twice would be paid twice
        D("proxy_next_upstream", "off"),
    )
