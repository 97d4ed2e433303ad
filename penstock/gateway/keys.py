"""The seam to whoever knows the keys."""

from __future__ import annotations

from typing import Protocol

from .records import Principal


class Keys(Protocol):
    """Who a secret belongs to."""

    async def principal(self, secret: str) -> Principal | None:
        """Whose key this is, as of now or a moment ago; None for one that is unknown, revoked or expired."""
        ...
