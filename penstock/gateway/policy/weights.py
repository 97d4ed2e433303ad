"""How routes share out requests among their targets, where that is not as the spec has it.

    spec ──┬─ routes' own weights
           └─ instead ──▶ targets      as was said over the admin API, until the spec's own are others

What was said holds for the targets and weights that the spec had then. Once a spec has others, its author has
decided, and what was said before is void: so a rollout ends with the spec that makes its result last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from penstock.core.errors import InvalidRequest, quote
from penstock.spec.model import Spec
from penstock.spec.routes import Route, Target


class Weight(msgspec.Struct, frozen=True):
    """Of one target."""

    model: str
    upstream: str | None
    """None for a model of ours."""
    weight: float

    @property
    def name(self) -> str:
        """As errors and people name it: `model`, or `model@upstream`."""
        return self.model if self.upstream is None else f"{self.model}@{self.upstream}"


class Steering(msgspec.Struct, frozen=True):
    """What was said of one route."""

    route: str
    targets: tuple[Weight, ...]
    """What its weights are."""
    instead: tuple[Weight, ...]
    """What the spec's were when that was said."""
    changed: int = 0
    """Unix nanoseconds."""
    note: str = ""
    """Why, in its author's words."""


def own(route: Route) -> tuple[Weight, ...]:
    """The spec's weights of a route."""
    return tuple(Weight(each.model, each.upstream, each.weight) for each in route.targets)


def check(name: str, route: Route, wanted: Sequence[Weight]) -> tuple[Weight, ...]:
    """New weights in the order of the route's targets. Raises InvalidRequest: a target is missing, is there
    twice or is none of the route's, or all weights are 0."""
    given = {(each.model, each.upstream): each for each in wanted}
    if len(given) < len(wanted):
        raise InvalidRequest("A target stands there twice.", param="targets")
    ours = own(route)
    unknown = [each for key, each in given.items() if key not in {(it.model, it.upstream) for it in ours}]
    missing = [each for each in ours if (each.model, each.upstream) not in given]
    if unknown or missing:
        names = ", ".join(each.name for each in ours)
        what = f"{quote(unknown[0].name)} is none of them" if unknown else f"{missing[0].name} is missing"
        raise InvalidRequest(
            f"The targets of {name} are {names}; {what}.",
            param="targets",
            advice="Give the weight of each; 0 for one that shall get no requests.",
        )
    if not any(each.weight for each in wanted):
        raise InvalidRequest("All weights are 0, and nobody would be asked.", param="targets")
    return tuple(given[each.model, each.upstream] for each in ours)


def holds(spec: Spec, steering: Steering) -> bool:
    """Whether the spec still is what a steering was said of."""
    route = spec.routes.get(steering.route)
    return route is not None and own(route) == steering.instead


def weighed(spec: Spec, steerings: Iterable[Steering]) -> Spec:
    """The spec with the weights that hold now; steerings that are void change nothing."""
    changed: dict[str, Route] = {}
    for each in steerings:
        if holds(spec, each):
            targets: list[Target] = [
                target.model_copy(update={"weight": weight.weight})
                for target, weight in zip(spec.routes[each.route].targets, each.targets, strict=True)
            ]
            changed[each.route] = spec.routes[each.route].model_copy(update={"targets": tuple(targets)})
    routes: Mapping[str, Route] = {**spec.routes, **changed}
    return spec.model_copy(update={"routes": routes}) if changed else spec
