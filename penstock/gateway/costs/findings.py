"""What patterns are found in, and what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Sums = Mapping[str, int]
"""Of ledger.schema.MEASURES."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Sums that habits are found in."""

    features: Mapping[tuple[Any, ...], Sums] = field(default_factory=dict)
    """By (feature, route, upstream, model, pool, context)."""
    untagged: Mapping[tuple[Any, ...], Sums] = field(default_factory=dict)
    """Of requests without a feature, by (key id, key's name)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One of them."""

    kind: str
    subject: str
    """The pool, feature, key or model that it is about."""
    dollars: int | None
    """Nanodollars of the span that it takes, or may take at most; None where nobody can tell."""
    text: str
    """In plain words, with what to do about it."""
