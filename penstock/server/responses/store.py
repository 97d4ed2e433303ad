"""Responses that were made, for those who go on with them or ask for them again.

    id ──▶ Entry: the response as it was told, what was asked, the conversation, events; whose it is
    id of an item, asked or told ──▶ the item

It is bounded in number and in bytes: the eldest goes first, but none that is still being made. It knows
neither HTTP nor engines. Whose a response is not, does not learn that it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.json import encode

from penstock.core.errors import RouteNotFound, quote

from .events import EventLog


class ResponseNotFound(RouteNotFound):
    """There is no such response, or it is somebody else's."""

    code = "response_not_found"


@dataclass(slots=True)
class Entry:
    """One response."""

    owner: str
    response: Mapping[str, Any]
    """As the API tells it."""
    items: Sequence[dict[str, Any]] = ()
    """What was asked, of this response alone."""
    conversation: Sequence[Mapping[str, Any]] = ()
    """All messages up to here, the answer among them, in the chat's form; instructions left out."""
    cancel: Callable[[], None] | None = None
    """Of one that is still being made in the background."""
    events: EventLog | None = None
    """Of one that is made in the background, and may be followed."""
    size: int = field(default=0)
    """Bytes, about."""

    def by_id(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, item) of what was asked and what was told."""
        for item in (*self.items, *self.response.get("output", ())):
            if isinstance(item.get("id"), str):
                yield item["id"], item


class ResponseStore:
    """The latest responses of a server."""

    def __init__(self, most: int, most_bytes: int) -> None:
        """Most responses, and most bytes of all of them."""
        self._most = most
        self._most_bytes = most_bytes
        self._entries: dict[str, Entry] = {}
        """The eldest first."""
        self._items: dict[tuple[str, str], str] = {}
        """(owner, id of an item) → the latest response that has it."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, id: str, entry: Entry) -> bool:
        """Keep a response, in place of the one that has this id. False if there is no place: it is larger
        than all that may be kept, or all others are still being made."""
        self._drop(id)
        entry.size = len(encode((entry.response, entry.items, entry.conversation)))
        if entry.events is not None:
            entry.size += entry.events.bytes
        if entry.size > self._most_bytes or not self._make_room(1, entry.size, id):
            return False
        self._entries[id] = entry
        for item_id, _ in entry.by_id():
            self._items[entry.owner, item_id] = id
        self.bytes += entry.size
        return True

    def grow(self, id: str, size: int) -> bool:
        """Count more bytes of events of a response that is still being made. False if there is no place."""
        entry = self._entries.get(id)
        if entry is None:  # nobody wants it any more
            return True
        if not self._make_room(0, size, id):
            return False
        entry.size += size
        self.bytes += size
        return True

    def get(self, id: str, owner: str) -> Entry:
        """Raises ResponseNotFound, also for one that is somebody else's."""
        entry = self._entries.get(id)
        if entry is None or entry.owner != owner:
            raise ResponseNotFound(
                f"Response with id {quote(id)} not found.",
                advice="The server keeps the latest ones: --max-stored-responses.",
            )
        return entry

    def item(self, id: str, owner: str) -> dict[str, Any]:
        """What was asked or told under this id. Raises ResponseNotFound."""
        entry = self._entries.get(self._items.get((owner, id), ""))
        for item_id, item in entry.by_id() if entry is not None else ():
            if item_id == id:
                return item
        raise ResponseNotFound(
            f"Item with id {quote(id)} not found.",
            param="input",
            advice="Items of the latest responses are kept: --max-stored-responses.",
        )

    def delete(self, id: str, owner: str) -> Entry:
        """Forget one. Raises ResponseNotFound."""
        entry = self.get(id, owner)
        self._drop(id)
        return entry

    def _make_room(self, responses: int, size: int, own: str) -> bool:
        """Forget the eldest others that are whole until so much fits."""
        for name in [name for name, each in self._entries.items() if each.cancel is None and name != own]:
            if self._fits(responses, size):
                break
            self._drop(name)
        return self._fits(responses, size)

    def _fits(self, responses: int, size: int) -> bool:
        return len(self._entries) + responses <= self._most and self.bytes + size <= self._most_bytes

    def _drop(self, id: str) -> None:
        entry = self._entries.pop(id, None)
        if entry is None:
            return
        self.bytes -= entry.size
        for item_id, _ in entry.by_id():
            if self._items.get((entry.owner, item_id)) == id:
                del self._items[entry.owner, item_id]
