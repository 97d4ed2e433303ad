"""Who may call: API keys as bearer tokens, or in Anthropic's x-api-key, compared in constant time.

Guards every path but health and metrics, which probes and scrapers read without a key, and the description of
the API, which says nothing of this server that its source does not say.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import AuthenticationFailed, InvalidRequest

from .exchange import header
from .paths import PROBES

#: Paths that need no key.
OPEN_PATHS = PROBES | {"/docs", "/openapi.json"}


class PermissionDenied(InvalidRequest):
    """Whoever asks is known, and may not have this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


def bearer(authorization: str) -> str | None:
    """The token of an Authorization header; None where its scheme is another."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def is_trusted(scope: Scope) -> bool:
    """Whether the request came with a trusted key."""
    return bool(scope.get("trusted_key"))


def caller(scope: Scope) -> str:
    """Who asks, as a digest of the key; "" where there are no keys. What somebody made belongs to his key."""
    return str(scope.get("caller", ""))


class AuthMiddleware:
    """Raises AuthenticationFailed for requests without one of `keys` or of `trusted`, whose holders may speak
    for others (`is_trusted`). Paths are normal ones (`paths`)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], trusted: Sequence[str] = ()) -> None:
        self._app = app
        # digests are of equal length: the comparison tells nothing about the length of a key either
        self._digests = tuple(sha256(key.encode()).digest() for key in (*keys, *trusted))
        self._trusted = len(trusted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        given = header(scope, b"authorization")
        advice = "Send the header `Authorization: Bearer KEY`."
        key = header(scope, b"x-api-key") if given is None else bearer(given)
        if given is None and not key:
            raise AuthenticationFailed("No API key was provided.", advice=advice)
        if key is None:  # the scheme is not quoted: without one, it is the key
            raise AuthenticationFailed("The Authorization header is not a bearer token.", advice=advice)
        digest = sha256(key.encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        if not any(matches):
            raise AuthenticationFailed("The API key is wrong.")
        scope["caller"] = digest.hex()
        scope["trusted_key"] = any(matches[len(matches) - self._trusted :])
