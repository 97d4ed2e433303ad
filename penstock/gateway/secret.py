"""Secrets of whoever runs the gateway: from the environment, and compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256

from starlette.types import Scope

from penstock.core.errors import AuthenticationFailed, StartupError
from penstock.http.auth import bearer
from penstock.http.exchange import header

_SHORTEST = 16
"""Characters: who guesses has no account to be locked out of."""


class Secret:
    """One; only its digest is kept."""

    def __init__(self, text: str) -> None:
        self._digest = sha256(text.encode()).digest()

    def matches(self, given: str) -> bool:
        """Whether it is this one."""
        return hmac.compare_digest(sha256(given.encode()).digest(), self._digest)


def from_environment(variable: str, param: str, environment: Mapping[str, str]) -> str:
    """The secret in an environment variable. Raises StartupError.

    Args:
        param: where the spec names the variable.
    """
    secret = environment.get(variable, "").strip()
    if len(secret) >= _SHORTEST and secret.isascii() and secret.isprintable():
        return secret
    problem = f"holds no key of {_SHORTEST} characters or more that can stand in a header"
    raise StartupError(
        f"{param}: the environment variable {variable} {problem if secret else 'is not set'}.",
        param=param,
        advice=f"As {variable}=$(openssl rand -hex 32), or take {param} out of the spec.",
    )


def presented(scope: Scope, what: str) -> str:
    """The bearer token of a request. Raises AuthenticationFailed. `what`: as `admin key`."""
    given = bearer(header(scope, b"authorization") or "")
    if not given:
        raise AuthenticationFailed(
            f"No {what} was provided.", advice="Send the header `Authorization: Bearer KEY`."
        )
    return given
