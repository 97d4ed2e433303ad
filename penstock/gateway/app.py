"""The gateway's application: its paths, and who may see what of them.

POST  /v1/chat/completions, …   endpoints.ENDPOINTS     a key; metered
GET   /v1/models[/NAME]         what the key may use    a key
…     /v1/responses/NAME…       responses.manage          its owner's
…     /admin/v1/…              admin.Admin               the admin key; here, or at a port of its own
…     /v1/files… /v1/batches…   files.pages               their owner's
POST  /v1/outcomes              outcomes                  of the caller's own requests
GET   /health /ping /livez /readyz                      nobody's secret
GET   /metrics                  prometheus                a key of its own, where the spec wants one
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec.json import encode
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import AuthenticationFailed, Draining, ModelNotFound, PenstockError, quote
from penstock.http.config import HttpConfig
from penstock.http.exchange import respond
from penstock.http.layers import application

from . import metrics
from .door import Door
from .endpoints import ENDPOINTS, Endpoint
from .policy.routes import Way
from .responses import manage
from .secret import presented

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Handled:
    """A function as an ASGI application; Starlette takes a bare one for something else."""

    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handler(scope, receive, send)


@dataclass(frozen=True, slots=True)
class _Relayed:
    """A relayed endpoint."""

    door: Door
    endpoint: Endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        door, endpoint = self.door, self.endpoint
        if door.tracing is None:
            await door.serve(endpoint, scope, receive, send)
            return
        await door.tracing.around(
            endpoint.path, scope, send, lambda send: door.serve(endpoint, scope, receive, send)
        )


def create_app(door: Door, config: HttpConfig) -> ASGIApp:
    """The application around a door."""
    pages = _Pages(door)
    routes = [Route(each.path, _Relayed(door, each), methods=["POST"]) for each in ENDPOINTS]
    routes += [
        Route("/v1/models", _Handled(pages.models), methods=["GET"]),
        Route("/v1/models/{name:path}", _Handled(pages.model), methods=["GET"]),
        Route("/v1/responses/{name}", _Handled(pages.response), methods=["GET", "DELETE"]),
        Route("/v1/responses/{name}/cancel", _Handled(pages.cancel), methods=["POST"]),
        Route("/v1/responses/{name}/input_items", _Handled(pages.input_items), methods=["GET"]),
        Route("/health", _Handled(pages.alive), methods=["GET"]),
        Route("/ping", _Handled(pages.alive), methods=["GET"]),
        Route("/livez", _Handled(pages.alive), methods=["GET"]),
        Route("/readyz", _Handled(pages.ready), methods=["GET"]),
        Route("/metrics", _Handled(pages.metrics), methods=["GET"]),
    ]
    own_port = door.spec.gateway.admin is not None and door.spec.gateway.admin.port is not None
    if door.admin is not None and not own_port:
        routes += door.admin.routes()
    if door.files is not None:
        routes += door.files.routes()
    if door.outcomes is not None:
        routes += door.outcomes.routes()
    return application(routes, config)


def create_admin_app(door: Door, config: HttpConfig) -> ASGIApp:
    """The application of the admin API at a port of its own."""
    return application([] if door.admin is None else door.admin.routes(), config)


class _Pages:
    """What the gateway answers itself."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._created = int(time.time())

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The union of all that the key may use."""
        names = await self._names(scope)
        data = [self._card(name, way) for name, way in names.items()]
        await respond(send, encode({"object": "list", "data": data}))

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One of them."""
        names = await self._names(scope)
        name = scope["path_params"]["name"]
        if name not in names:
            raise ModelNotFound(f"The model {quote(name)} does not exist.", param="model")
        await respond(send, encode(self._card(name, names[name])))

    async def response(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A response that was made before."""
        await manage(self._door, "", scope, receive, send)

    async def cancel(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Its end."""
        await manage(self._door, "/cancel", scope, receive, send)

    async def input_items(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What it was asked."""
        await manage(self._door, "/input_items", scope, receive, send)

    async def alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The process answers."""
        await respond(send, b"{}")

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """It takes requests."""
        if self._door.draining:
            raise Draining("The gateway is shutting down.", retry_after=1)
        await respond(send, b"{}")

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """For Prometheus."""
        door = self._door
        if door.metrics_key is not None and not door.metrics_key.matches(presented(scope, "key for metrics")):
            raise AuthenticationFailed("The key for metrics is wrong.")
        door.metrics.in_flight(door.load)
        now = door.monotonic()
        for station in door.stations.all():
            door.metrics.station(station.id, station.in_flight, station.health.weight(now))
        if door.fleet is not None:
            for model in door.fleet.models():
                for replica in door.fleet.replicas(model):
                    door.metrics.engine(replica)
        await respond(send, door.metrics.page(), content_type=metrics.CONTENT_TYPE.encode())

    async def _names(self, scope: Scope) -> dict[str, Way]:
        try:
            caller = await self._door.caller(scope)
        except PenstockError as error:
            self._door.metrics.refused(error.code or str(error.status))
            raise
        principal = caller.principal
        return dict(self._door.book.names(principal.team, principal.routes))

    def _card(self, name: str, way: Way) -> dict[str, object]:
        known = [place.context for place in (*way.targets, *way.fallback) if place.context is not None]
        context = way.route.context or (min(known) if known else None)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "penstock",
            "root": way.name,
            "max_model_len": context,
        }
