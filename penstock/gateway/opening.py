"""A door with all that it stands on, from a spec: keys and meter in the ledger's database, stations."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy as sa

from penstock.core.errors import PenstockError, quote
from penstock.core.near import meant
from penstock.spec.model import Spec

from .admin import Admin, admin_secret
from .admin_routes import RoutesAdmin
from .discovery import Discovery
from .door import Door
from .files.pages import Files
from .fleet import Fleet
from .ledger.keys import KeyCache, KeyStore
from .ledger.schema import meta
from .ledger.store import Beat, Store
from .ledger.weights import Helm, WeightTable
from .metering import LedgerMeter
from .outcomes import Outcomes
from .paid import PaidHours
from .secret import Secret, from_environment
from .settler import Settler
from .stations import Stations
from .tracing import open_tracing

logger = logging.getLogger("penstock.gateway")

FIRST_KEY = "first"
"""Name of the key that is made where there is none."""


async def open_door(spec: Spec, fleet: Fleet | None) -> tuple[Door, str | None]:
    """The door, which is closed by `Door.close`; and the secret of the first key, if the ledger had none and
    it was made now (`gateway.first_key`).

    Raises StartupError: the database or the spool cannot be used, the key of an upstream or of the admin API,
    or a package, is missing.
    """
    secret_of_admin = admin_secret(spec)
    metrics_key = None
    if spec.gateway.metrics_key_env is not None:
        metrics_key = Secret(
            from_environment(spec.gateway.metrics_key_env, "gateway.metrics_key_env", os.environ)
        )
    tracing = open_tracing() if spec.gateway.tracing else None
    stations = Stations(spec, fleet)
    cache: KeyCache | None = None
    helm: Helm | None = None

    def heard(beat: Beat) -> None:
        if cache is not None:
            cache.version(beat.keys)
        if helm is not None:
            helm.version(beat.weights)

    meter = await LedgerMeter.open(spec.ledger, on_beat=heard)
    try:
        keys = KeyStore(meter.store)
        cache = KeyCache(keys, meter.thread)
        secret = None
        if spec.gateway.first_key:
            secret = await meter.thread.call(lambda: _first_key(meter.store, keys))
        _warn_of_teams(spec, await meter.thread.call(keys.teams))
        ids = await meter.thread.call(lambda: _id_secret(meter.store))
    except PenstockError:
        await meter.close()
        raise
    door = Door(spec, cache, meter, stations, fleet, id_secret=ids)
    helm = Helm(WeightTable(meter.store), meter.thread, door.steer)
    try:
        await helm.open()
    except PenstockError:
        await door.close()
        raise
    if stations.discovered:
        discovery = Discovery(stations, door.metrics.forget)
        await discovery.look()  # before the first request
        door.beside.append(discovery)
    door.files = Files(door, meter, Path(spec.ledger.spool))
    door.outcomes = Outcomes(door, meter, spec.ledger.outcome_window)
    door.beside += [
        Settler(meter, door.bills, stations, door.metrics, door.wall),
        PaidHours(meter, spec, door.wall),
        door.files.settling,
    ]
    door.tracing, door.metrics_key = tracing, metrics_key
    if secret_of_admin is not None:
        door.admin = Admin(secret_of_admin, spec, meter.store, meter.thread, cache)
        door.admin.more += RoutesAdmin(door.admin, spec, meter.store, meter.thread, door.wall).paths()
    return door, secret


def _warn_of_teams(spec: Spec, teams: Mapping[str, int]) -> None:
    """Keys of teams that the spec does not have are refused: whoever has taken one out shall know."""
    for team, count in sorted(teams.items()):
        if team not in spec.teams:
            what = "key is" if count == 1 else "keys are"
            advice = (
                f"Add it under teams, or `penstock keys update ID --team`. {meant(team, spec.teams, 0.5)}"
            )
            logger.warning(
                "%d %s of the team %s, which the spec does not have: requests get a 403 (unknown_team). %s",
                count,
                what,
                quote(team),
                advice.rstrip(),
            )


def _first_key(store: Store, keys: KeyStore) -> str | None:
    """Of a ledger without keys, made by whoever marks it first: gateways that start together make one, and
    one of them tells it."""
    if keys.list():
        return None
    with store.writing(durable=True) as connection:
        mark = store.insert(meta).values(name="first_key", value=1)
        mark = mark.on_conflict_do_nothing(index_elements=["name"]).returning(meta.c.name)
        if connection.execute(mark).first() is None:
            return None
    return keys.create(name=FIRST_KEY)[1]


def _id_secret(store: Store) -> bytes:
    """What makes ids this ledger's own (gateway/owned.py): made once, the same for all of its gateways. The
    table holds whole numbers, so it is four of them, of 63 bits."""
    names = [f"id_secret_{number}" for number in range(4)]
    with store.writing(durable=True) as connection:
        for name in names:
            statement = store.insert(meta).values(name=name, value=secrets.randbits(63))
            connection.execute(statement.on_conflict_do_nothing(index_elements=["name"]))
        found = connection.execute(sa.select(meta.c.name, meta.c.value).where(meta.c.name.in_(names)))
        values = dict(found.all())
    return b"".join(int(values[name]).to_bytes(8) for name in names)
