"""The admin API's part for routes: how each shares out requests, other weights at once, and how targets do.

    GET   /admin/v1/routes               all, with the weights of the spec and those that hold
    GET   /admin/v1/routes/NAME          one
    POST  /admin/v1/routes/NAME/weights  {"targets": [{"model", "upstream", "weight"}, …], "note": "…"};
                                         {"targets": null}: the spec's again
    GET   /admin/v1/routes/NAME/traffic  ?since=5m: attempts, failures, latencies of targets, by the ledger

A change is one transaction in the ledger's database; every worker of every gateway on it takes all of it over
between two requests, within two seconds. It outlasts restarts, and ends with a spec that has other targets or
weights for the route.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import Field
from starlette.routing import Route as Path
from starlette.types import Receive, Scope, Send

from penstock.core.errors import ModelNotFound, quote
from penstock.spec.model import Spec
from penstock.spec.parts import Name, Part, Share
from penstock.spec.routes import Route

from .admin import Admin, Guarded, Text, answer, body_of, listed, query_of
from .files.batches import PATH as BATCHES
from .ledger.schema import ledger
from .ledger.store import Store
from .ledger.thread import StoreThread
from .ledger.weights import WeightTable
from .policy.amounts import NANO
from .policy.routes import Book
from .policy.weights import Steering, Weight, check, holds, own

logger = logging.getLogger("penstock.gateway")

_MOST = 50_000
"""Rows that one look at the traffic reads, the newest ones."""
_QUANTILES = (0.5, 0.95, 0.99)


class NewWeight(Part):
    """Of a target."""

    model: Name
    upstream: Name | None = None
    weight: Share


class NewWeights(Part):
    """Of a route."""

    targets: Annotated[tuple[NewWeight, ...], Field(min_length=1, max_length=64)] | None
    note: Text = ""


class Since(Part):
    """From when on."""

    since: Text = "10m"
    until: Text | None = None


class _Nothing(Part):
    """No fields."""


class RoutesAdmin:
    """These paths."""

    def __init__(
        self, admin: Admin, spec: Spec, store: Store, thread: StoreThread, clock: Callable[[], int]
    ) -> None:
        """`clock`: Unix time in nanoseconds."""
        self._admin, self._spec, self._store, self._thread = admin, spec, store, thread
        self._table = WeightTable(store)
        self._book = Book(spec)
        self._clock = clock

    def paths(self) -> list[Path]:
        """For the application."""
        base = "/admin/v1/routes"
        return [
            Path(base, Guarded(self._admin, self.all), methods=["GET"]),
            Path(f"{base}/{{name:path}}/weights", Guarded(self._admin, self.weigh), methods=["POST"]),
            Path(f"{base}/{{name:path}}/traffic", Guarded(self._admin, self.traffic), methods=["GET"]),
            Path(f"{base}/{{name:path}}", Guarded(self._admin, self.one), methods=["GET"]),
        ]

    async def all(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every route of the spec."""
        query_of(_Nothing, scope)
        said = await self._said()
        await answer(
            send, listed([self._shown(name, said.get(name)) for name in self._spec.routes], last=None)
        )

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One of them."""
        query_of(_Nothing, scope)
        name, _ = self._route(scope)
        await answer(send, self._shown(name, (await self._said()).get(name)))

    async def weigh(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Other weights, or the spec's own again."""
        name, route = self._route(scope)
        wanted = await body_of(NewWeights, scope, receive)
        if wanted.targets is None:
            await self._thread.call(lambda: self._table.drop(name), urgent=True)
            steering = None
        else:
            given = [Weight(each.model, each.upstream, each.weight) for each in wanted.targets]
            targets = check(name, route, given)
            steering = Steering(name, targets, own(route), self._clock(), wanted.note)
            await self._thread.call(lambda: self._table.put(steering), urgent=True)
        shown = self._shown(name, steering)
        shares = ", ".join(f"{each['model']} {100 * each['share']:g} %" for each in shown["targets"])
        logger.info("admin: the route %s is shared out: %s (%s)", quote(name), shares, quote(wanted.note))
        await answer(send, shown)

    async def traffic(self, scope: Scope, receive: Receive, send: Send) -> None:
        """How each target has done since then."""
        name, route = self._route(scope)
        page = query_of(Since, scope)
        since = self._admin.moment(page.since, "since") or 0
        until = self._admin.moment(page.until, "until")
        rows = await self._admin.read(lambda: _rows(self._store, name, since, until))
        places = [self._book.place(target) for target in route.targets]
        found = _count(rows, [(place.name, place.model) for place in places])
        data = [
            {"model": target.model, "upstream": target.upstream, **figures}
            for target, figures in zip(route.targets, found, strict=True)
        ]
        body = {"object": "traffic", "route": name, "since": since / NANO, "rows": len(rows), "data": data}
        await answer(send, {**body, "complete": len(rows) < _MOST})

    def _route(self, scope: Scope) -> tuple[str, Route]:
        name = scope["path_params"]["name"]
        route = self._spec.routes.get(name)
        if route is None:
            error = ModelNotFound(
                f"There is no route {quote(name)}.",
                advice=f"There are {', '.join(self._spec.routes) or 'none'}.",
            )
            error.code = "route_not_found"
            raise error
        return name, route

    async def _said(self) -> dict[str, Steering]:
        _, found = await self._thread.call(self._table.read, urgent=True)
        return {each.route: each for each in found}

    def _shown(self, name: str, said: Steering | None) -> dict[str, Any]:
        """As JSON; what was said of another spec's targets does not hold."""
        ours = own(self._spec.routes[name])
        steering = said if said is not None and holds(self._spec, said) else None
        weights = ours if steering is None else steering.targets
        total = sum(each.weight for each in weights)
        return {
            "object": "route",
            "name": name,
            "targets": [
                {
                    "model": each.model,
                    "upstream": each.upstream,
                    "weight": each.weight,
                    "share": each.weight / total,
                    "spec_weight": mine.weight,
                }
                for each, mine in zip(weights, ours, strict=True)
            ],
            "as_in_spec": steering is None,
            "changed_at": None if steering is None else steering.changed / NANO,
            "note": "" if steering is None else steering.note,
        }


def _rows(store: Store, route: str, since: int, until: int | None) -> Sequence[Mapping[str, Any]]:
    """Rows of requests that have ended; but not copies, which are nobody's and go where no weight leads, and
    not batches, which take hours."""
    columns = ledger.c
    query = (
        sa.select(
            columns.upstream,
            columns.model,
            columns.status,
            columns.end,
            columns.attempts,
            columns.failed,
            columns.first_byte,
            columns.total,
        )
        .where(columns.route == route, columns.at >= since, columns.attempts > 0)
        .where(columns.key_id != "", columns.endpoint != BATCHES)
        .order_by(columns.at.desc())
        .limit(_MOST)
    )
    if until is not None:
        query = query.where(columns.at < until)
    with store.reading() as connection:
        return connection.execute(query).mappings().all()  # type: ignore[return-value]


def _count(rows: Iterable[Mapping[str, Any]], places: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Attempts at each place, how many failed, how many it refused (a 4xx: clients may be to blame), and
    latencies of requests that it answered as the first one asked."""
    asked = dict.fromkeys(places, 0)
    failed, refused = dict(asked), dict(asked)
    first: dict[tuple[str, str], list[int]] = {place: [] for place in places}
    total: dict[tuple[str, str], list[int]] = {place: [] for place in places}
    for row in rows:
        faults = [tuple(each) for each in row["failed"] or ()]
        for each in faults:
            if each in asked:
                asked[each] += 1
                failed[each] += 1
        last = (row["upstream"], row["model"])
        if last not in asked or len(faults) >= row["attempts"]:  # its last attempt is one of those
            continue
        if row["end"] in ("client_gone", "killed"):  # nobody knows how it would have ended
            continue
        asked[last] += 1
        if 400 <= row["status"] < 500:
            refused[last] += 1
        elif row["attempts"] == 1:
            if row["first_byte"] is not None:
                first[last].append(row["first_byte"])
            if row["total"] is not None:
                total[last].append(row["total"])
    return [
        {
            "attempts": asked[place],
            "failed": failed[place],
            "refused": refused[place],
            "timed": len(total[place]),
            "first_byte_seconds": _quantiles(first[place]),
            "total_seconds": _quantiles(total[place]),
        }
        for place in places
    ]


def _quantiles(values: list[int]) -> dict[str, float] | None:
    """Nearest rank: a value that was measured, of which so many are no larger."""
    if not values:
        return None
    values = sorted(values)
    return {
        f"p{100 * share:g}": values[max(0, -int(-share * len(values) // 1) - 1)] / NANO
        for share in _QUANTILES
    }
