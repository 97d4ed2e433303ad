"""Lists of the API, page by page, as OpenAI writes them: the query that asks for a page, and the page.

It knows queries and pages; it does not know what is listed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import Scope

from penstock.core.errors import InvalidRequest, quote


class Query:
    """The query of a list. Raises InvalidRequest for what it may not have."""

    def __init__(self, scope: Scope, known: Collection[str]) -> None:
        text = scope.get("query_string", b"").decode("latin-1")
        try:
            pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=16)
        except ValueError:
            raise InvalidRequest("The query of this URL is not understood here.") from None
        self._given = dict(pairs)
        for name in self._given:
            if name not in known:
                raise InvalidRequest(
                    f"The parameter {quote(name)} of this URL is not known here.",
                    param=name,
                    advice=f"There is {', '.join(sorted(known))}.",
                )

    def text(self, name: str) -> str | None:
        """A parameter; None where it is not given or empty."""
        return self._given.get(name) or None

    def limit(self, default: int, most: int) -> int:
        """How many entries a page has."""
        given = self._given.get("limit", str(default))
        if not given.isascii() or not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= most:
            raise InvalidRequest(f"limit must be from 1 to {most}, got {quote(given)}.", param="limit")
        return int(given)

    def oldest_first(self) -> bool:
        """Whether `order` is `asc`."""
        given = self._given.get("order", "desc")
        if given not in ("asc", "desc"):
            raise InvalidRequest(f"order must be asc or desc, got {quote(given)}.", param="order")
        return bool(given == "asc")


def page_of(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A page as OpenAI writes it."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
