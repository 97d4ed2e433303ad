"""What files and batches share: their names, their owners, pages of lists, and the counting of refusals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.core.errors import Unavailable, quote
from penstock.gateway.metering import LedgerMeter
from penstock.gateway.owned import NotFound
from penstock.gateway.relay import Failed
from penstock.gateway.stations import Station

from .objects import Objects
from .upstream import Missing, UpstreamSaysNo

if TYPE_CHECKING:
    from penstock.gateway.door import Door
    from penstock.gateway.request import Caller

TAG = "penstock_request"
"""Entry of a batch's metadata at its upstream, by which it is found again if its answer was lost. Clients do
not see it."""
_NAMED = ("id", "input_file_id", "output_file_id", "error_file_id")
T = TypeVar("T")


class Shared:
    """The door, the store, and what is done with both."""

    def __init__(self, door: Door, meter: LedgerMeter, folder: Path) -> None:
        """`folder`: on disk, for uploads under way."""
        self.door = door
        self.meter = meter
        self.folder = folder
        self.objects = Objects(meter.store)

    def store(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do work of `objects` in the ledger's thread. Raises Unavailable."""
        return self.meter.thread.call(work)

    def stations(self) -> dict[str, Station]:
        """By id. The only replica of an upstream, and the first of several, are the same one: what it has is
        found again when others join it."""
        found = {station.id: station for station in self.door.stations.all()}
        for station in list(found.values()):
            name, several, number = station.id.rpartition("/")
            found.setdefault(name if several and number == "0" else f"{station.id}/0", station)
        return found

    def headers(self, request_id: str, station: Station, caller: Caller) -> dict[str, str]:
        """Of a request that brings something."""
        headers = {"x-request-id": request_id}
        if station.trusted:
            headers["x-penstock-tenant"] = tenant(caller)
        return headers

    def named(self, value: dict[str, Any], station: Station, key_id: str) -> dict[str, Any]:
        """An upstream's object with the client's ids."""
        owned = self.door.owned
        ids = {
            field: owned.name(value[field], station, key_id)
            for field in _NAMED
            if isinstance(value.get(field), str) and value[field]
        }
        value = {**value, **ids}
        metadata = value.get("metadata")
        if isinstance(metadata, dict) and TAG in metadata:
            value["metadata"] = {name: each for name, each in metadata.items() if name != TAG} or None
        return value

    def where(self, name: str, caller: Caller) -> tuple[str, Station]:
        """The upstream's id and the station of a name. Raises NotFound."""
        return self.door.owned.read(name, self.door.stations.all(), caller.principal.key_id)

    @contextlib.contextmanager
    def told(self, station: Station, known: dict[str, str]) -> Iterator[None]:
        """What goes wrong upstream, as the client is told of it.

        Args:
            known: the upstream's ids with the client's names, the one that is asked for first.
        """
        try:
            yield
        except Failed as failed:
            raise failed.error(station.id) from None
        except Missing:
            raise NotFound(f"There is no {quote(next(iter(known.values())))}.") from None
        except UpstreamSaysNo as error:
            for id, name in known.items():
                error.message = error.message.replace(id, name)
            raise


def tenant(caller: Caller) -> str:
    """Whose cached prefixes are whose."""
    principal = caller.principal
    return f"team:{principal.team}" if principal.team else f"key:{principal.key_id}"


class TooMany(Unavailable):
    """As many uploads are under way as may be."""

    code = "too_many_uploads"


class TooSlow(Unavailable):
    """An upload has taken all the time that it may."""

    code = "upload_too_slow"


def whole(value: object) -> int | None:
    """A whole number, if it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None
