"""Who a client is, where a proxy is between: what trusted proxies say of it, and nobody else.

    X-Forwarded-For: 6.6.6.6, 203.0.113.9, 10.0.0.7     from 10.0.0.8
                     └ anybody  └ the client  └─ trusted ─┘

Every proxy adds, at the right end, the address that it was called from. So the list is read from there, past
addresses that are trusted; the first other one was seen by somebody trusted, and what stands to its left was
said by anybody. `Forwarded` (RFC 7239) is read in the same way. A proxy writes one of the two and passes on
the other as a client has sent it: where both are there, and do not say the same, neither is believed.

It knows addresses and two headers; who uses the answer (the access log, limits of one client) reads it in
`scope["client"]`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import TooManyConnections
from .paths import PROBES

UNIX = "unix"
"""Whoever comes over a Unix socket."""

_BEHIND = "penstock.behind_proxy"
"""Key of a scope: the client's address, where a trusted proxy is between."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PAIR = re.compile(r"""([^";=]*)=(?:[ \t]*"([^"\\]*)"[ \t]*|([^";]*))(?:;|$)""")
_HOPS = 64
"""Proxies behind one another; further left nobody looks."""
_ELEMENT = re.compile(r"""((?:[^,"]|"[^"\\]*")*)(?:,|$)""")


class Proxies:
    """Whom to believe. Raises ValueError, quoting it, for what is neither an address nor a network."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._unix = UNIX in trusted
        self._networks = [ipaddress.ip_network(each, strict=False) for each in trusted if each != UNIX]
        self._trusts = lru_cache(maxsize=4096)(self._looked_up)

    def trusts(self, address: str) -> bool:
        """Whether a peer is believed, by its address; UNIX for one that came over a Unix socket."""
        return self._trusts(address)

    def client(self, scope: Scope) -> str | None:
        """The client's address, as the headers of a trusted peer tell it; None where they do not."""
        forwarded_for, forwarded = [], []
        for name, value in scope["headers"]:
            if name == b"x-forwarded-for":
                forwarded_for.append(value.decode("latin-1"))
            elif name == b"forwarded":
                forwarded.append(value.decode("latin-1"))
        said = set()
        if forwarded_for:
            said.add(self._nearest(reversed(",".join(forwarded_for).split(","))))
        if forwarded:
            said.add(self._nearest(reversed(list(_nodes(",".join(forwarded))))))
        return said.pop() if len(said) == 1 else None

    def _nearest(self, nodes: Iterator[str]) -> str | None:
        """The first that is not trusted; else the last that is an address."""
        last = None
        for node in islice(nodes, _HOPS):
            address = _address(node)
            if address is None:  # `unknown`, an alias, nonsense: further left nobody is known either
                break
            last = str(address)
            if not self._trusts(last):
                break
        return last

    def _looked_up(self, address: str) -> bool:
        if address == UNIX:
            return self._unix
        found = _address(address)
        return found is not None and any(found in network for network in self._networks)


class Forwarded:
    """An application that finds the client's address in `scope["client"]`, port 0, where a proxy tells it."""

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = scope.get("client")
            if self._proxies.trusts(peer[0] if peer else UNIX):
                address = self._proxies.client(scope)
                if address is not None:
                    scope["client"] = (address, 0)
                # whom nobody can tell apart count as one: hiding one's address gains nothing
                scope[_BEHIND] = address or "unknown"
        await self._app(scope, receive, send)


def few_of_each(app: ASGIApp, most: int) -> ASGIApp:
    """The application for at most so many requests at a time of one client behind proxies, whose connections
    nobody can count. Probes are not counted."""
    running: dict[str, int] = {}

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        address = scope.get(_BEHIND)
        if address is None or scope["path"] in PROBES:
            await app(scope, receive, send)
            return
        if running.get(address, 0) >= most:
            raise TooManyConnections(
                f"{most} requests of this client are under way, which is all that it may have.",
                advice="Ask again when one has ended.",
                retry_after=1,
            )
        running[address] = running.get(address, 0) + 1
        try:
            await app(scope, receive, send)
        finally:
            running[address] -= 1
            if not running[address]:
                del running[address]

    return counted


def _nodes(forwarded: str) -> Iterator[str]:
    """The `for` of each element of Forwarded; empty where an element has none, or cannot be read."""
    at = 0
    while at <= len(forwarded):
        element = _ELEMENT.match(forwarded, at)
        if element is None:  # a quote without its end: nothing of it can be told apart any more
            yield ""
            return
        yield _for(element[1])
        at = element.end() + (0 if element[0].endswith(",") else 1)


def _for(element: str) -> str:
    """One element's `for`; what stands in quotes, as a client's Host may, is none."""
    element, found, at = element.rstrip("; \t"), "", 0
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None:
            return ""
        if pair[1].strip(" \t").lower() == "for":
            found = pair[2] or pair[3] or ""
        at = pair.end()
    return found


def _address(node: str) -> _Address | None:
    """The address of a node: 192.0.2.1, 192.0.2.1:80, 2001:db8::1, [2001:db8::1]:80. None if it is none."""
    node = node.strip(" \t")
    if node.startswith("["):
        node = node[1:].partition("]")[0]
    elif node.count(":") == 1:
        node = node.partition(":")[0]
    try:
        address = ipaddress.ip_address(node.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped
