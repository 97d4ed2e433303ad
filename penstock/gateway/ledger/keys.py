"""Keys in the ledger's database: made, listed, changed, rotated, revoked, and looked up.

    sk-ps- 43 characters of 256 random bits, 6 of a checksum

Stored is the sha256 of the secret: nobody can guess 256 bits, so a slow hash would protect nothing. The
checksum lets a mistyped or made up key be refused without a look into the database. Every change raises a
number in the table `meta`, which workers read with each sign of life: what they remember of keys is older
than that by a second at most.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
import sqlalchemy as sa

from penstock.core.errors import InvalidRequest, Unavailable, quote
from penstock.core.near import meant
from penstock.gateway.limits.leased import Caller
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.records import Principal
from penstock.spec.model import Limits, Spec
from penstock.spec.parts import ServiceClass
from penstock.spec.units import seconds

from .schema import keys, meta
from .store import Store, StoreDown

PREFIX = "sk-ps-"
_RANDOM = 43
_CHECK = 6
_LENGTH = len(PREFIX) + _RANDOM + _CHECK


class KeyNotFound(InvalidRequest):
    """There is no key of that id."""

    status = 404
    code = "key_not_found"


class KeyRevoked(InvalidRequest):
    """The key is revoked, and stays so."""

    status = 409
    code = "key_revoked"


class Key(msgspec.Struct, kw_only=True):
    """A key as it may be shown: everything but the secret. Times are Unix nanoseconds."""

    id: str
    name: str = ""
    team: str = ""
    tags: dict[str, str] = {}
    routes: tuple[str, ...] | None = None
    """Routes that it may use; None is all."""
    limits: dict[str, Any] | None = None
    """Its own, as in the spec; None for its team's or everybody's."""
    local_only: bool = False
    service_class: ServiceClass = "realtime"
    hint: str = ""
    """The last characters of the secret."""
    created: int = 0
    expires: int | None = None
    revoked: int | None = None

    def state(self, now: int) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


def new_secret() -> str:
    """A fresh secret of 256 random bits."""
    random = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    return f"{PREFIX}{random}{_checksum(random)}"


def well_formed(secret: str) -> bool:
    """Whether a text can be a secret of ours; says nothing about whether it is one."""
    if len(secret) != _LENGTH or not secret.startswith(PREFIX) or not secret.isascii():
        return False
    random = secret[len(PREFIX) : -_CHECK]
    return hmac.compare_digest(_checksum(random), secret[-_CHECK:])


def digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return sha256(secret.encode()).digest()


def expiry(text: str, now: int) -> int:
    """`30d` from now, or a date or time (UTC where it does not say), as Unix nanoseconds.

    Raises ValueError.
    """
    try:
        when = datetime.fromisoformat(text)
        at = round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()) * NANO
    except (ValueError, OverflowError):
        at = now + round(seconds(text) * NANO)
    if not now < at < 1 << 63:
        raise ValueError("it is not in the future" if at <= now else "it is too far away")
    return at


def check_names(spec: Spec, team: str, routes: Collection[str]) -> None:
    """Raise InvalidRequest unless the spec has a key's team and routes; a typing error would be a key that
    may do nothing."""
    if team and team not in spec.teams:
        raise InvalidRequest(
            f"There is no team {quote(team)} in the spec.",
            param="team",
            advice=meant(team, spec.teams, 0.5) or f"There is {', '.join(sorted(spec.teams)) or 'none'}.",
        )
    known = {*spec.routes, *spec.models}
    for index, route in enumerate(routes):
        if route not in known:
            raise InvalidRequest(
                f"There is no route {quote(route)} in the spec.",
                param=f"routes.{index}",
                advice=meant(route, known, 0.5),
            )


class KeyStore:
    """The table of keys. Blocks."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def create(
        self,
        *,
        name: str = "",
        team: str = "",
        tags: Mapping[str, str] | None = None,
        routes: Sequence[str] | None = None,
        limits: Limits | None = None,
        local_only: bool = False,
        service_class: ServiceClass = "realtime",
        expires: int | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which is nowhere else and can never be shown again."""
        secret = new_secret()
        key = Key(
            id=f"key_{secrets.token_hex(6)}",
            name=name,
            team=team,
            tags=dict(tags or {}),
            routes=_stored("routes", routes),
            limits=_stored("limits", limits),
            local_only=local_only,
            service_class=service_class,
            hint=secret[-4:],
            created=self._now(),
            expires=expires,
        )
        values = {**msgspec.structs.asdict(key), "digest": digest(secret)}
        with self._store.writing(durable=True) as connection:
            connection.execute(keys.insert().values(values))
            self._changed(connection)
        return key, secret

    def update(self, id: str, values: Mapping[str, Any]) -> Key:
        """Change what a key may, from now on; its secret stays.

        Args:
            values: by the names of `create`. Budgets go on from what was used: of its accounts, only the caps
                are others.

        Raises KeyNotFound, KeyRevoked.
        """
        stored = {name: _stored(name, value) for name, value in values.items()}
        with self._store.writing(durable=True) as connection:
            found = connection.execute(sa.select(keys.c.revoked).where(keys.c.id == id).with_for_update())
            row = found.one_or_none()
            if row is None:
                raise _no_key(id)
            if row.revoked is not None:
                raise KeyRevoked(f"The key {id} is revoked.", advice="Create a new one.")
            connection.execute(keys.update().where(keys.c.id == id).values(stored))
            self._changed(connection)
        return self.get(id)

    def list(
        self, *, team: str | None = None, after: str | None = None, limit: int | None = None
    ) -> list[Key]:
        """Keys, oldest first: all of them, a team's, at most `limit`, those after one of an id. Raises
        KeyNotFound for that one."""
        place = (keys.c.created, keys.c.id)
        query = sa.select(keys).order_by(*place).limit(limit)
        if team is not None:
            query = query.where(keys.c.team == team)
        if after is not None:
            query = query.where(sa.tuple_(*place) > sa.tuple_(self.get(after).created, after))
        with self._store.reading() as connection:
            return [_key(row) for row in connection.execute(query)]

    def teams(self) -> dict[str, int]:
        """Teams of keys that are good, and how many keys each has."""
        good = sa.or_(keys.c.expires.is_(None), keys.c.expires > self._now())
        query = (
            sa.select(keys.c.team, sa.func.count())
            .where(keys.c.team != "", keys.c.revoked.is_(None), good)
            .group_by(keys.c.team)
        )
        with self._store.reading() as connection:
            return dict(connection.execute(query).all())

    def get(self, id: str) -> Key:
        """One key. Raises KeyNotFound."""
        with self._store.reading() as connection:
            row = connection.execute(sa.select(keys).where(keys.c.id == id)).one_or_none()
        if row is None:
            raise _no_key(id)
        return _key(row)

    def revoke(self, id: str) -> Key:
        """Let a key, and the secret before its last rotation, be refused from now on. Raises KeyNotFound."""
        with self._store.writing(durable=True) as connection:
            changed = keys.update().where(keys.c.id == id)
            changed = changed.values(revoked=sa.func.coalesce(keys.c.revoked, self._now()))
            if connection.execute(changed).rowcount != 1:
                raise _no_key(id)
            self._changed(connection)
        return self.get(id)

    def rotate(self, id: str, *, grace: float = 0.0) -> tuple[Key, str]:
        """A new secret for a key; the old one works for `grace` more seconds.

        Raises KeyNotFound, KeyRevoked.
        """
        secret = new_secret()
        with self._store.writing(durable=True) as connection:
            row = connection.execute(
                sa.select(keys.c.digest, keys.c.revoked).where(keys.c.id == id).with_for_update()
            ).one_or_none()
            if row is None:
                raise _no_key(id)
            if row.revoked is not None:
                raise KeyRevoked(f"The key {id} is revoked.", advice="Create a new one.")
            values: dict[str, Any] = {"digest": digest(secret), "hint": secret[-4:]}
            values |= {"old_digest": None, "old_until": None}
            if grace > 0:
                values |= {"old_digest": row.digest, "old_until": self._now() + round(grace * NANO)}
            connection.execute(keys.update().where(keys.c.id == id).values(values))
            self._changed(connection)
        return self.get(id), secret

    def find(self, digest: bytes) -> tuple[Key, int | None] | None:
        """The key of a secret's digest, and until when that is good (Unix nanoseconds); None if it is not."""
        with self._store.reading() as connection:
            row = connection.execute(
                sa.select(keys).where(sa.or_(keys.c.digest == digest, keys.c.old_digest == digest))
            ).first()
        if row is None or row.revoked is not None:
            return None
        if hmac.compare_digest(row.digest, digest):
            return _key(row), row.expires
        ends = [each for each in (row.expires, row.old_until) if each is not None]
        return _key(row), min(ends)

    def _changed(self, connection: sa.Connection) -> None:
        statement = self._store.insert(meta).values(name="keys", value=1)
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"value": meta.c.value + 1})
        )

    def _now(self) -> int:
        return round(self._clock() * NANO)


class KeyCache:
    """Keys as a worker sees them (gateway/keys.py), in its event loop. Bounded, whatever is sent."""

    def __init__(
        self,
        store: KeyStore,
        caller: Caller,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        size: int = 16_384,
        unknown: int = 4096,
        lookups: int = 32,
        stale: float = 60.0,
    ) -> None:
        """`size`: keys that are remembered; `unknown`: digests that are none; `lookups`: at a time; `stale`:
        seconds for which known keys are good while the database does not answer."""
        self._store = store
        self._caller = caller
        self._clock = clock
        self._monotonic = monotonic
        self._size, self._unknown_size, self._stale = size, unknown, stale
        self._known: OrderedDict[bytes, tuple[Principal, int | None]] = OrderedDict()
        self._unknown: OrderedDict[bytes, None] = OrderedDict()
        self._gate = asyncio.Semaphore(lookups)
        self._under_way: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._version: int | None = None
        self._heard = monotonic()

    def version(self, version: int) -> None:
        """The database's version of all keys, at least once a second; another one than before, and everything
        is looked up again."""
        self._heard = self._monotonic()
        if version != self._version:
            self._version = version
            self._known.clear()
            self._unknown.clear()

    async def principal(self, secret: str) -> Principal | None:
        """Whose key this is; None for one that is unknown, revoked or expired. Raises Unavailable where the
        database is needed and does not answer."""
        if len(secret) != _LENGTH:
            return None
        key = digest(secret)
        found = self._known.get(key)
        if found is not None:
            if self._monotonic() - self._heard > self._stale:
                raise StoreDown(
                    "Keys cannot be checked: the ledger's database does not answer.", retry_after=5
                )
            self._known.move_to_end(key)
            principal, until = found
            return principal if until is None or self._clock() * NANO < until else None
        if key in self._unknown or not well_formed(secret):
            return None
        task = self._under_way.get(key)
        if task is None:
            if len(self._under_way) >= 16 * self._size:
                raise Unavailable("Too many keys are being looked up.", retry_after=1)
            task = self._under_way[key] = asyncio.create_task(self._look(key))
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(task)

    async def _look(self, key: bytes) -> Principal | None:
        async with self._gate:
            version = self._version
            found = await self._caller.call(lambda: self._store.find(key), urgent=True)
        if found is None:
            if version == self._version:
                _remember(self._unknown, key, None, self._unknown_size)
            return None
        entry = (_principal(found[0]), found[1])
        if version == self._version:  # or it may be from before the change
            _remember(self._known, key, entry, self._size)
        principal, until = entry
        return principal if until is None or self._clock() * NANO < until else None


def _remember(cache: OrderedDict[bytes, Any], key: bytes, value: Any, size: int) -> None:
    cache[key] = value
    while len(cache) > size:
        cache.popitem(last=False)


def _principal(key: Key) -> Principal:
    return Principal(
        key_id=key.id,
        key_name=key.name,
        team=key.team,
        tags=key.tags,
        routes=key.routes,
        local_only=key.local_only,
        service_class=key.service_class,
        limits=None if key.limits is None else limits_of(key.limits),
    )


def _stored(name: str, value: Any) -> Any:
    """What the table holds of a value that `create` takes."""
    if name == "limits" and value is not None:
        return value.model_dump(mode="json", exclude_none=True)
    return tuple(value) if name == "routes" and value is not None else value


def limits_of(stored: Mapping[str, Any]) -> Limits:
    """Limits as they are stored: money in nanodollars, as the model holds it."""
    return Limits.model_construct(**stored)


def _key(row: sa.Row[Any]) -> Key:
    values = {name: getattr(row, name) for name in Key.__struct_fields__}
    values["routes"] = None if row.routes is None else tuple(row.routes)
    return Key(**values)


def _no_key(id: str) -> KeyNotFound:
    return KeyNotFound(f"There is no key {id!r}.", advice="`penstock keys list` shows the ids.")


def _checksum(random: str) -> str:
    return base64.b32encode(zlib.crc32(random.encode()).to_bytes(4, "big")).decode().lower()[:_CHECK]
