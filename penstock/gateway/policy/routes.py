"""Where a request may go: names, aliases, headers and tags → a way with its places, in the order of asking.

    model, headers, tags ──find──▶ Way ──order(draws)──▶ target (by weight) · other targets · fallback

A *place* is a model at somebody who serves it: everything that the door has to know to ask there and to price
the answer. All of it is made of the spec once, at the start.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.core.errors import InvalidRequest, ModelNotFound, quote
from penstock.spec.model import Price, Spec, Tag
from penstock.spec.routes import Route, Target

Kind = Literal["penstock", "vllm", "openai", "anthropic"]


class Forbidden(InvalidRequest):
    """The key may not do this."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class UnknownTeam(Forbidden):
    """The key is of a team that the spec does not have: nobody knows what that may."""

    code = "unknown_team"


@dataclass(frozen=True, slots=True)
class Place:
    """A model at somebody who serves it."""

    name: str
    """Of the model of ours, or of the upstream."""
    local: bool
    """Whether `name` is a model of ours, whose replicas a fleet runs."""
    model: str
    """What they call it there."""
    kind: Kind
    in_house: bool
    """Whether requests that must not leave may go there."""
    context: int | None
    """Longest context in tokens, if known."""
    devices: int
    """Of each replica."""
    pool: str
    """Whose devices it runs on; empty for a cloud."""
    device: str
    """Kind of device; empty for a cloud."""
    device_price: int | None
    """Nanodollars of a device and hour."""
    price: Price | None
    """By tokens; where there is one, it counts, and not the device's."""
    weight: float = 1.0
    priorities: bool = False
    """Whether it serves requests by a field `priority`, the lowest first."""

    @property
    def on_devices(self) -> bool:
        """Whether what it uses is device time of ours."""
        return bool(self.device)


@dataclass(frozen=True, slots=True)
class Way:
    """A route whose names have been followed."""

    name: str
    route: Route
    targets: tuple[Place, ...]
    fallback: tuple[Place, ...]
    shadow: tuple[Place, ...]
    comparator: Price | None
    escalation: Way | None = None
    """Where an answer comes from that the targets' does not do for; under this route's name."""

    def places(self, local_only: bool) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
        """Targets and fallbacks that a request may reach. Raises Forbidden where there is none."""
        targets, fallback = self.targets, self.fallback
        if self.stays(local_only):
            targets = tuple(place for place in targets if place.in_house)
            fallback = tuple(place for place in fallback if place.in_house)
            if not targets and not fallback:
                error = Forbidden(
                    f"{self.name} is served outside of the house only, where this request must not go "
                    "(local_only of its key, team, tag or route)."
                )
                error.code = "local_only"
                raise error
        return targets, fallback

    def stays(self, local_only: bool) -> bool:
        """Whether a request must not leave the house here; `local_only`: wherever it goes."""
        return local_only or self.route.local_only


def order(targets: Sequence[Place], fallback: Sequence[Place], draws: Sequence[float]) -> tuple[Place, ...]:
    """Places in the order of asking: targets by weight without replacement, then fallbacks as they stand.

    Args:
        draws: one number of [0, 1) for each target. The least of -ln(1 - u) / w wins: a race of exponential
            clocks (Efraimidis and Spirakis, 2006), which gives each target its share of the first places.
    """
    if len(targets) < 2:
        return (*targets, *fallback)
    raced = sorted(
        range(len(targets)), key=lambda index: (-math.log1p(-draws[index]) / targets[index].weight, index)
    )
    return (*(targets[index] for index in raced), *fallback)


def shadows(way: Way, local_only: bool, draws: Sequence[float]) -> tuple[Place, ...]:
    """Who gets a copy: each with its weight as the probability."""
    inside = way.stays(local_only)
    return tuple(
        place
        for place, draw in zip(way.shadow, draws, strict=True)
        if draw < place.weight and (place.in_house or not inside)
    )


class Book:
    """All ways of a spec."""

    def __init__(self, spec: Spec) -> None:
        """`spec` has been checked: its names lead somewhere."""
        self._spec = spec
        self._ways: dict[str, Way] = {}
        for name, model in spec.models.items():
            alone = Route(targets=(Target(model=name),), context=model.max_model_len)
            self._ways[name] = self._way(name, alone)
        # a route of a model's name stands in place of the model alone
        for name, route in spec.routes.items():
            way = self._way(name, route)
            for each in (name, *route.aliases):
                self._ways[each] = way
        self._matching = [self._ways[name] for name, route in spec.routes.items() if route.match]
        self._by_team: dict[str, frozenset[str] | None] = {
            name: None if team.routes is None else frozenset(team.routes) for name, team in spec.teams.items()
        }

    def find(
        self,
        model: str,
        headers: Mapping[str, str],
        tags: Mapping[str, str],
        team: str = "",
        routes: Collection[str] | None = None,
    ) -> Way:
        """The way of a request. Raises ModelNotFound; Forbidden where the key may not go.

        Args:
            headers: of the request, names in lower case.
            tags: the request's and the key's.
            team: of the key.
            routes: that the key may use; None is all that its team may.
        """
        for way in self._matching:
            if any(_fits(match.headers, headers, match.tags, tags) for match in way.route.match):
                break
        else:
            found = self._ways.get(model)
            if found is None:
                raise ModelNotFound(
                    f"The model {quote(model)} does not exist.",
                    param="model",
                    advice="GET /v1/models lists those that this key may use.",
                )
            way = found
        if not self.allows(way, team, routes):
            raise Forbidden(
                f"This key may not use {quote(model)}.",
                param="model",
                advice="GET /v1/models lists the models that it may use.",
            )
        return way

    def allows(self, way: Way, team: str, routes: Collection[str] | None) -> bool:
        """Whether a key of `team` with `routes` of its own may go a way."""
        ours = self._by_team.get(team)
        return (ours is None or way.name in ours) and (routes is None or way.name in routes)

    def names(self, team: str, routes: Collection[str] | None) -> Iterator[tuple[str, Way]]:
        """What a key may ask for, aliases included, in the order of the spec."""
        return ((name, way) for name, way in self._ways.items() if self.allows(way, team, routes))

    def ways(self) -> Iterator[Way]:
        """Each way once."""
        return iter({way.name: way for way in self._ways.values()}.values())

    def know(self, team: str) -> None:
        """Raise UnknownTeam unless the spec has the team of a key. A key without one has no more to heed."""
        if team and team not in self._spec.teams:
            raise UnknownTeam(
                f"The team {quote(team)} of this key is not in the gateway's spec.",
                advice="Whoever runs the gateway adds it under teams, or gives the key another one.",
            )

    def team_local_only(self, team: str) -> bool:
        """Whether a team's requests never leave the house."""
        return team in self._spec.teams and self._spec.teams[team].local_only

    def tags_local_only(self, tags: Mapping[str, str]) -> bool:
        """Whether requests with one of these tags never leave the house."""
        return any(tag.local_only for tag in self._tags(tags))

    def in_background(self, team: str, tags: Mapping[str, str]) -> bool:
        """Whether nobody waits for the requests of a team, or for those with these tags."""
        ours = self._spec.teams.get(team)
        if ours is not None and ours.service_class == "background":
            return True
        return any(tag.service_class == "background" for tag in self._tags(tags))

    def _tags(self, tags: Mapping[str, str]) -> Iterator[Tag]:
        """What the spec says of tags."""
        for name, values in self._spec.tags.items():
            if name in tags and (tag := values.get(tags[name])) is not None:
                yield tag

    def place(self, target: Target) -> Place:
        """What a target of the spec leads to."""
        spec = self._spec
        if target.upstream is None:
            model = spec.models[target.model]
            pool = spec.pools[model.pool]
            return Place(
                name=target.model,
                local=True,
                model=target.model,
                kind=model.engine,
                in_house=True,
                context=model.max_model_len,
                devices=model.devices,
                pool=model.pool,
                device=pool.hardware,
                device_price=pool.price_per_hour,
                price=None,
                weight=target.weight,
                priorities=model.engine == "vllm" and _by_priority(model.flags),
            )
        upstream = spec.upstreams[target.upstream]
        served = upstream.models[target.model]
        owned = None if upstream.pool is None else spec.pools[upstream.pool]
        return Place(
            name=target.upstream,
            local=False,
            model=served.name or target.model,
            kind=upstream.kind,
            in_house=upstream.in_house,
            context=served.context,
            devices=upstream.devices,
            pool=upstream.pool or "",
            device="" if owned is None else owned.hardware,
            device_price=None if owned is None else owned.price_per_hour,
            price=served.price,
            weight=target.weight,
            priorities=upstream.priorities,
        )

    def _way(self, name: str, route: Route) -> Way:
        comparator = None
        if route.comparator is not None and route.comparator.upstream is not None:
            comparator = self._spec.upstreams[route.comparator.upstream].models[route.comparator.model].price
        return Way(
            name=name,
            route=route,
            targets=tuple(self.place(target) for target in route.targets if target.weight > 0),
            fallback=tuple(map(self.place, route.fallback)),
            shadow=tuple(map(self.place, route.shadow)),
            comparator=comparator,
            escalation=self._escalation(name, route),
        )

    def _escalation(self, name: str, route: Route) -> Way | None:
        """What follows a route's attempt: counted as the same route, under the other one's terms if it is
        one."""
        if route.escalate is None:
            return None
        if route.escalate.route is not None:
            other = self._spec.routes[route.escalate.route]
            inside = other.local_only or route.local_only
            kept: dict[str, Any] = {"local_only": inside, "comparator": route.comparator, "shadow": ()}
            return self._way(name, other.model_copy(update=kept))
        changed: dict[str, Any] = {
            "targets": route.escalate.to,
            "fallback": (),
            "shadow": (),
            "escalate": None,
        }
        return self._way(name, route.model_copy(update=changed))


def _by_priority(flags: Mapping[str, Any]) -> bool:
    """Whether an engine's flags let it serve requests by priority."""
    return any(name.replace("_", "-") == "scheduling-policy" and flags[name] == "priority" for name in flags)


def _fits(
    headers: Mapping[str, str], given: Mapping[str, str], tags: Mapping[str, str], tagged: Mapping[str, str]
) -> bool:
    """Whether all that is wanted is there; a match that wants nothing takes nothing."""
    if not headers and not tags:
        return False
    return all(given.get(name.lower()) == value for name, value in headers.items()) and all(
        tagged.get(name) == value for name, value in tags.items()
    )
