"""Tags as people write them: TAG=VALUE."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.core.errors import InvalidRequest, quote


def read_tags(given: Iterable[str], name: str) -> dict[str, str]:
    """`feature=search`, … → tag → value. Raises InvalidRequest.

    Args:
        name: the flag or parameter that they were given as.
    """
    tags: dict[str, str] = {}
    for each in given:
        tag, equals, value = each.partition("=")
        if not (tag and equals and value):
            raise InvalidRequest(
                f"{name} {quote(each)} is not TAG=VALUE.", param=name, advice=f"As {name} feature=search."
            )
        if tag in tags:
            raise InvalidRequest(
                f"{name} {quote(each)}: {quote(tag)} stands twice; a request has one value of it.", param=name
            )
        tags[tag] = value
    return tags
