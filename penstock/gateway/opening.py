"""A door with all that it stands on, from a spec: keys and meter in the ledger's database, stations."""

from __future__ import annotations

from penstock.core.errors import PenstockError
from penstock.spec.model import Spec

from .door import Door
from .fleet import Fleet
from .ledger.keys import KeyCache, KeyStore
from .ledger.store import Beat
from .metering import LedgerMeter
from .stations import Stations

FIRST_KEY = "first"
"""Name of the key that is made where there is none."""


async def open_door(spec: Spec, fleet: Fleet | None) -> tuple[Door, str | None]:
    """The door, which is closed by `Door.close`; and the secret of the first key, if the ledger had none and
    it was made now.

    Raises StartupError: the database or the spool cannot be used, the key of an upstream is missing.
    """
    stations = Stations(spec, fleet)
    cache: KeyCache | None = None

    def heard(beat: Beat) -> None:
        if cache is not None:
            cache.version(beat.keys)

    meter = await LedgerMeter.open(spec.ledger, on_beat=heard)
    try:
        keys = KeyStore(meter.store)
        cache = KeyCache(keys, meter.thread)
        secret = await meter.thread.call(lambda: _first_key(keys))
    except PenstockError:
        await meter.close()
        raise
    return Door(spec, cache, meter, stations, fleet), secret


def _first_key(keys: KeyStore) -> str | None:
    if keys.list():
        return None
    return keys.create(name=FIRST_KEY)[1]
