"""What is compared: servers at a URL, and models for which an engine is started here. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from penstock.core.errors import StartupError
from penstock.gateway.local.command import Command
from penstock.gateway.policy.price import TokenPrice


@dataclass(frozen=True, slots=True)
class Remote:
    """A server that is there."""

    root: str
    """The API's root, with its /v1."""
    model: str | None = None
    """None takes the only one, or the first, that it lists."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Local:
    """A model that is served while its answers are wanted."""

    model: str
    command: Callable[[int, str], Command] = field(repr=False)
    """Of the engine, for a port and a key."""
    identity: Mapping[str, Any]
    """What its answers depend on: weights, flags, version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a side's answers cost, where that is known."""

    tokens: TokenPrice | None = None
    device_hour: int | None = None
    """Nanodollars for an hour of its device."""
    said: str = ""
    """As it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of those who answer."""

    name: str
    """`baseline`, `candidate`, `int8`: as the report has it."""
    where: Remote | Local
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields for each request, in place of those of the set."""
    price: Price = field(default_factory=Price)


def is_url(text: str) -> bool:
    """Whether a side is named by a URL; else it is a model's name."""
    return "://" in text


def api_root(url: str, flag: str) -> str:
    """`http://host:8000`, with or without a slash, means `http://host:8000/v1`. Raises StartupError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise StartupError(
            f"{flag} is {url!r}.", advice="Write http://HOST:PORT, https://HOST/v1, or a model."
        )
    if parts.username is not None or parts.password is not None:
        raise StartupError(
            f"{flag} has a name or a password in its URL, which would stand in reports.",
            advice=f"Leave it out, and put a key into PENSTOCK_{flag.strip('-').upper()}_API_KEY.",
        )
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"
