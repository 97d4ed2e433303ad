"""The admin API: keys are made, listed, changed, rotated and revoked, the ledger and its budgets are read.

    POST  /admin/v1/keys                 make one; its secret is in this answer, and nowhere afterwards
    GET   /admin/v1/keys[/ID]            without secrets
    POST  /admin/v1/keys/ID              change what it may; its secret stays
    POST  /admin/v1/keys/ID/rotate       a new secret; {"grace": "1h"}
    POST  /admin/v1/keys/ID/revoke       refused by all workers and gateways within two seconds
    GET   /admin/v1/ledger               rows, newest first
    GET   /admin/v1/limits               how the limits of a key, a team or tags stand
    …     /admin/v1/routes               how routes share out requests: admin_routes.py

It is what `penstock keys` and `penstock ledger` do, for who has the admin key: a secret of its own, from the
environment. Bodies and queries are checked as the spec is: unknown names are refused. Keys go through the
ledger's thread, in which requests wait for leases; what may read much has a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qs

import msgspec
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from penstock.core.errors import AuthenticationFailed, InvalidRequest, quote
from penstock.http.auth import PermissionDenied
from penstock.http.body import parse_object, read_body
from penstock.http.exchange import header, respond
from penstock.spec.load import said
from penstock.spec.model import Limits, Spec
from penstock.spec.parts import Name, Part, ServiceClass
from penstock.spec.units import Seconds

from .keys import Keys
from .ledger import report
from .ledger.keys import PREFIX, Key, KeyStore, check_names, expiry, limits_of
from .ledger.store import Store
from .limits.leased import Caller
from .policy.accounts import account_id, window_end, window_start
from .policy.amounts import NANO, Limit
from .policy.limits import Entitlements
from .secret import Secret, from_environment, presented
from .tags import read_tags

logger = logging.getLogger("penstock.gateway")

_BODY = 64 << 10
"""Bytes of a request."""
_MOST = 1000
"""Entries of a page."""
_ENCODER = msgspec.json.Encoder(decimal_format="number")

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


Text = Annotated[str, Field(max_length=128), AfterValidator(_printable)]
"""What people write: one line."""
TagName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Tags = Annotated[dict[TagName, Text], Field(max_length=32)]
Count = Annotated[int, Field(ge=1, le=_MOST)]


class NewKey(Part):
    """What to make: as the flags of `penstock keys create`."""

    name: Text = ""
    team: Text = ""
    tags: Tags = Field(default_factory=dict)
    routes: Annotated[tuple[Name, ...], Field(max_length=256)] | None = None
    local_only: bool = False
    service_class: ServiceClass = "realtime"
    expires: Annotated[str, Field(max_length=40)] | None = None
    limits: Limits | None = None


class KeyChange(NewKey):
    """What to change of one: fields that are given stand in place of what they were, `null` is none."""


class Rotation(Part):
    """How to."""

    grace: Seconds = 0.0


class Nothing(Part):
    """No fields."""


class KeyPage(Part):
    """Which keys."""

    limit: Count = 100
    after: Text | None = None
    team: Text | None = None


class RowPage(Part):
    """Which rows."""

    limit: Count = 100
    after: Annotated[str, Field(max_length=256)] | None = None
    since: Text | None = None
    until: Text | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    key: Text | None = None
    team: Text | None = None
    tag: tuple[Text, ...] = ()
    route: Text | None = None
    upstream: Text | None = None
    model: Text | None = None
    settlement: Text | None = None


class Whose(Part):
    """Whose limits."""

    key: Text | None = None
    team: Text | None = None
    tag: tuple[Text, ...] = ()


class Admin:
    """All of it. Belongs to one event loop."""

    def __init__(
        self,
        secret: str,
        spec: Spec,
        store: Store,
        thread: Caller,
        keys: Keys,
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """
        Args:
            secret: the admin key.
            thread: in which keys are changed.
            keys: of requests; who has one of those is known, and may not do this.
            clock: Unix time in nanoseconds.
        """
        self._secret = Secret(secret)
        self._spec = spec
        self._store = store
        self._table = KeyStore(store)
        self._thread = thread
        self._keys = keys
        self._entitlements = Entitlements(spec)
        self._clock = clock
        self._reader = ThreadPoolExecutor(1, "penstock-admin")
        self.more: list[Route] = []
        """Paths of others, behind the same key."""

    def routes(self) -> list[Route]:
        """Its paths."""
        base = "/admin/v1"
        return [
            Route(f"{base}/keys", Guarded(self, self.keys), methods=["GET", "POST"]),
            Route(f"{base}/keys/{{id}}", Guarded(self, self.key), methods=["GET", "POST"]),
            Route(f"{base}/keys/{{id}}/rotate", Guarded(self, self.rotate), methods=["POST"]),
            Route(f"{base}/keys/{{id}}/revoke", Guarded(self, self.revoke), methods=["POST"]),
            Route(f"{base}/ledger", Guarded(self, self.ledger), methods=["GET"]),
            Route(f"{base}/limits", Guarded(self, self.limits), methods=["GET"]),
            *self.more,
        ]

    def close(self) -> None:
        """No more work."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def check(self, scope: Scope) -> None:
        """Raises AuthenticationFailed; PermissionDenied for a key that is good for requests only."""
        given = presented(scope, "admin key")
        if self._secret.matches(given):
            return
        if await self._keys.principal(given) is not None:
            raise PermissionDenied("This key is for requests; the admin API has one of its own.")
        raise AuthenticationFailed("The admin key is wrong.")

    # ---- keys ----

    async def keys(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All of them, or a new one."""
        if scope["method"] == "POST":
            await self._create(scope, receive, send)
            return
        page = query_of(KeyPage, scope)
        found = await self.read(
            lambda: self._table.list(team=page.team, after=page.after, limit=page.limit + 1)
        )
        shown = [self._shown(key) for key in found[: page.limit]]
        await answer(send, listed(shown, last=shown[-1]["id"] if len(found) > page.limit else None))

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        values = self._values(await body_of(NewKey, scope, receive), NewKey.model_fields)
        key, secret = await self._thread.call(partial(self._table.create, **values), urgent=True)
        _log(scope, "made", key)
        await answer(send, {**self._shown(key), "value": secret})

    async def key(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One of them, as it is or as it shall be."""
        id = scope["path_params"]["id"]
        if scope["method"] != "POST":
            query_of(Nothing, scope)
            await answer(send, self._shown(await self._find(id)))
            return
        wanted = await body_of(KeyChange, scope, receive)
        if not wanted.model_fields_set:
            raise InvalidRequest(
                "Nothing is to be changed.", advice=f"Give one of {', '.join(KeyChange.model_fields)}."
            )
        values = self._values(wanted, wanted.model_fields_set)
        key = await self._thread.call(lambda: self._table.update(id, values), urgent=True)
        _log(scope, f"changed ({', '.join(sorted(values))})", key)
        await answer(send, self._shown(key))

    async def rotate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A new secret."""
        how = await body_of(Rotation, scope, receive)
        id = scope["path_params"]["id"]
        key, secret = await self._thread.call(lambda: self._table.rotate(id, grace=how.grace), urgent=True)
        _log(scope, "rotated", key)
        await answer(send, {**self._shown(key), "value": secret})

    async def revoke(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Its end. The second time changes nothing."""
        await body_of(Nothing, scope, receive)
        id = scope["path_params"]["id"]
        key = await self._thread.call(lambda: self._table.revoke(id), urgent=True)
        _log(scope, "revoked", key)
        await answer(send, self._shown(key))

    # ---- what is read ----

    async def ledger(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rows, under the names of exports."""
        page = query_of(RowPage, scope)
        wanted = report.Filter(
            since=self.moment(page.since, "since"),
            until=self.moment(page.until, "until"),
            tags=tuple(read_tags(page.tag, "tag").items()),
            **{name: getattr(page, name) for name in _COLUMNS},
        )
        try:
            after = None if page.after is None else report.Place.read(page.after)
        except ValueError:
            raise InvalidRequest(
                f"after {quote(page.after)} is not the last_id of a page.", param="after"
            ) from None
        rows, last = await self.read(lambda: report.page(self._store, wanted, page.limit, after))
        await answer(send, listed(rows, last=None if last is None else str(last)))

    async def limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Caps, and of budgets what rows have charged. Rates are counted where requests are, not here."""
        whose = query_of(Whose, scope)
        if not whose.model_fields_set:
            raise InvalidRequest(
                "Whose limits?", advice="Name a key, a team, or a tag as tag=feature=search."
            )
        own: Limits | None = Limits()
        key_id, team, tags = "", whose.team or "", read_tags(whose.tag, "tag")
        if whose.key is not None:
            key = await self._find(whose.key)
            key_id, team, tags = key.id, whose.team or key.team, {**tags, **key.tags}
            own = None if key.limits is None else limits_of(key.limits)
        found = self._entitlements.of(key_id, team, tags, own)
        now = self._clock() / NANO
        accounts = {
            account_id(each.scope, each.unit, each.window, window_start(each.window, now)): each
            for each in found
        }
        booked = await self.read(lambda: self._store.booked(list(accounts)))
        data = [_standing(limit, *booked.get(id, (0, 0)), now) for id, limit in accounts.items()]
        await answer(send, listed(data, last=None))

    # ---- inside ----

    async def _find(self, id: str) -> Key:
        return await self._thread.call(lambda: self._table.get(id), urgent=True)

    async def read(self, work: Callable[[], T]) -> T:
        """Do what may read much, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _values(self, wanted: NewKey, names: Collection[str]) -> dict[str, Any]:
        """What these fields of a key shall be. Raises InvalidRequest for names that lead nowhere."""
        check_names(self._spec, wanted.team, wanted.routes or ())
        values = {name: getattr(wanted, name) for name in names}
        if "expires" in values:
            values["expires"] = self._expires(wanted.expires)
        return values

    def moment(self, text: str | None, name: str) -> int | None:
        """A time of a query in Unix nanoseconds. Raises InvalidRequest."""
        if text is None:
            return None
        try:
            return report.instant(text, self._clock())
        except ValueError as error:
            raise InvalidRequest(f"{name} {quote(text)} is no time: {error}.", param=name) from None

    def _expires(self, text: str | None) -> int | None:
        if text is None:
            return None
        try:
            return expiry(text, self._clock())
        except ValueError as error:
            raise InvalidRequest(f"expires {quote(text)}: {error}.", param="expires") from None

    def _shown(self, key: Key) -> dict[str, Any]:
        limits = None
        if key.limits is not None:
            limits = {
                name: value / NANO if name.startswith("dollars") else value
                for name, value in key.limits.items()
            }
        return {
            "object": "key",
            "id": key.id,
            "name": key.name,
            "team": key.team,
            "tags": key.tags,
            "routes": key.routes,
            "local_only": key.local_only,
            "service_class": key.service_class,
            "limits": limits,
            "redacted_value": f"{PREFIX}…{key.hint}",
            "created_at": key.created // NANO,
            "expires_at": None if key.expires is None else key.expires // NANO,
            "revoked_at": None if key.revoked is None else key.revoked // NANO,
            "state": key.state(self._clock()),
        }


def admin_secret(spec: Spec, environment: Mapping[str, str] = os.environ) -> str | None:
    """The admin key; None where the spec wants no admin API. Raises StartupError."""
    if spec.gateway.admin is None:
        return None
    return from_environment(spec.gateway.admin.key_env, "gateway.admin.key_env", environment)


class Guarded:
    """An endpoint for who has the admin key."""

    def __init__(self, admin: Admin, handler: Handler) -> None:
        self._admin = admin
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._admin.check(scope)
        await self._handler(scope, receive, send)


_COLUMNS = ("id", "key", "team", "route", "upstream", "model", "settlement")
"""Parameters that rows are compared with as they are."""


async def body_of(shape: type[M], scope: Scope, receive: Receive) -> M:
    """The body; one that is empty is `{}`, whatever a client's library declares it as."""
    empty = header(scope, b"content-length") in (None, "0") and header(scope, b"transfer-encoding") is None
    body = b"" if empty else await read_body(scope, receive, _BODY)
    return checked(shape, parse_object(body) if body.strip() else {})


def query_of(shape: type[M], scope: Scope) -> M:
    """The query, each parameter once; only lists may have several."""
    try:
        text = scope["query_string"].decode("ascii")
        given = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=64)
    except ValueError:  # a UnicodeDecodeError is one
        raise InvalidRequest("The query cannot be read.") from None
    values: dict[str, Any] = {}
    for name, found in given.items():
        several = name == "tag"
        if len(found) > 1 and not several:
            raise InvalidRequest(f"{quote(name)} stands {len(found)} times in the query.", param=name)
        values[name] = found if several else found[0]
    return checked(shape, values)


def checked(shape: type[M], value: Mapping[str, Any]) -> M:
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        path, what = next(said(error, shape))
        where = ".".join(map(str, path))
        refusal = InvalidRequest(f"{quote(where)}: {what}", param=where)
        if what.startswith("unknown key"):
            refusal.code = "unknown_parameter"
        raise refusal from None


def _standing(limit: Limit, used: int, leased: int, now: float) -> dict[str, Any]:
    money = limit.unit in ("dollars", "device_seconds")
    scale = NANO if money else 1
    budget = limit.window in ("day", "month")
    return {
        "object": "limit",
        "scope": limit.scope,
        "unit": limit.unit,
        "window": limit.window,
        "cap": limit.cap / scale,
        "used": used / scale if budget else None,
        "leased": leased / scale if budget else None,
        "remaining": max(0, limit.cap - used) / scale if budget else None,
        "resets_at": int(window_end(limit.window, window_start(limit.window, now))) if budget else None,
    }


def listed(data: list[dict[str, Any]], *, last: str | None) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": last is not None, "last_id": last}


async def answer(send: Send, value: Mapping[str, Any]) -> None:
    await respond(send, _ENCODER.encode(value), headers={"cache-control": "no-store"})


def _log(scope: Scope, what: str, key: Key) -> None:
    client = scope.get("client")
    logger.info(
        "admin: the key %s (%s, team %s) was %s, from %s",
        key.id,
        quote(key.name),
        quote(key.team),
        what,
        client[0] if client else "unix",
    )
