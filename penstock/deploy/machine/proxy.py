"""What a reverse proxy in front of one machine's gateway must do, whichever it is.

    client ──TLS──▶ proxy: bodies bounded, addresses limited, streams passed on as they come ──HTTP──▶ gateway

Keys, budgets and limits by key are the gateway's. The proxy ends TLS, keeps one address from taking all, and
hides what is not for clients: /metrics and /admin. Nothing is answered by it but errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from penstock.spec.model import Spec

_UPSTREAM_HEADERS = 600.0
"""Seconds that an engine of ours may take until its answer begins: what UpstreamModel's default is."""
_LEAST_IDLE = 300.0
_LEAST_RATE = 10.0
"""Requests/s of one address: a page that is loaded must not be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """The proxy's task."""

    host: str | None
    """Name of the server; None answers to any."""
    gateway: tuple[str, int]
    """Where the gateway is."""
    resolver: str | None
    """A name server that is asked for the gateway again and again; None where that has an address."""
    http_port: int
    """Answers with a redirect to HTTPS."""
    https_port: int
    public_port: int
    """What clients know as the port of HTTPS, for redirects."""
    certificate: str
    key: str
    """Files (PEM)."""
    idle_timeout: int
    """Seconds between two pieces of an answer, or of a request."""
    rate: int
    """Requests a second of one address; twice as many in a burst."""
    connections: int
    """Requests of one address at a time."""
    ipv6: bool
    """Whether it listens there, too."""
    max_body: int
    max_file: int
    """Bytes of a request; of one to /v1/files."""


def proxy(
    spec: Spec,
    *,
    gateway: tuple[str, int],
    resolver: str | None = None,
    ports: tuple[int, int],
    public_port: int,
    certificate: str,
    key: str,
    ipv6: bool,
) -> Proxy:
    """The task that a spec gives. `ports`: where the proxy listens, HTTP and HTTPS."""
    waits = [route.wait for route in spec.routes.values()] or [300.0]
    slowest = max([_UPSTREAM_HEADERS, *(each.timeout_headers for each in spec.upstreams.values())])
    # the gateway answers 503 or 504 by itself before this
    idle = max(_LEAST_IDLE, max(waits) + slowest)
    limits = [spec.limits, *(team.limits for team in spec.teams.values())]
    limits += [team.key_limits for team in spec.teams.values()]
    minute = max((each.requests_per_minute or 0 for each in limits), default=0)
    at_once = max((each.concurrent_requests or 0 for each in limits), default=0)
    return Proxy(
        host=None if spec.cluster.entry is None else spec.cluster.entry.host,
        gateway=gateway,
        resolver=resolver,
        http_port=ports[0],
        https_port=ports[1],
        public_port=public_port,
        certificate=certificate,
        key=key,
        ipv6=ipv6,
        idle_timeout=math.ceil(idle),
        # a key's own limits are the gateway's to refuse, and it says which; here is only what no key may
        rate=math.ceil(max(_LEAST_RATE, minute / 60)),
        connections=max(64, at_once),
        max_body=spec.gateway.max_body_bytes,
        max_file=spec.gateway.files.max_bytes + 64 * 1024,
    )


def error_body(code: str, message: str) -> str:
    """OpenAI's shape, as clients expect it."""
    return json.dumps({"error": {"message": message, "type": code, "param": None, "code": code}})


ERRORS = {
    413: error_body("payload_too_large", "The request is larger than this server takes."),
    429: error_body("rate_limit_exceeded", "Too many requests from this address. Try again in a second."),
    502: error_body("unavailable", "The gateway cannot be reached. Try again later."),
    504: error_body("timeout", "The gateway has not answered in time."),
}
"""Status → body of what the proxy says itself."""
HIDDEN = ("/metrics", "/admin")
"""Of the gateway, for those inside only."""
