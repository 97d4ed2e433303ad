"""Whether the names in a spec lead somewhere, and whether what it says can be true together."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator

from penstock.core.errors import quote
from penstock.core.near import meant

from .model import Spec
from .routes import Escalation, Route, Target
from .verifying import Pattern, Schema

_FIELDS = {
    "max-model-len": "max_model_len",
    "quantization": "quantization",
    "tensor-parallel-size": "devices",
    "kv-cache-memory-bytes": "memory",
}
"""Flags that are fields of a model."""
_TAKEN = frozenset(
    "model config host port uds api-key served-model-name device root-path "
    "ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs".split()
)
"""Flags that say where an engine is and who may use it."""

_SECRET = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})
"""Headers that hold keys."""

Problem = tuple[tuple[str | int, ...], str]
"""Where, and what."""


def problems(spec: Spec) -> list[Problem]:
    """Everything that is wrong between the parts of a spec whose parts are right."""
    return [
        *(*_models(spec), *_upstreams(spec), *_routes(spec), *_teams(spec)),
        *(*_gateway(spec), *_ledger(spec), *_cluster(spec)),
    ]


def _models(spec: Spec) -> Iterator[Problem]:
    taken: dict[str, int] = {}
    for name, model in spec.models.items():
        if model.pool not in spec.pools:
            yield ("models", name, "pool"), _unknown("pool", model.pool, spec.pools)
            continue
        most = model.scale.max if model.scale else model.replicas
        taken[model.pool] = taken.get(model.pool, 0) + model.replicas * model.devices
        if model.scale is not None:
            where = ("models", name, "scale")
            burst = model.scale.burst or model.pool
            if burst not in spec.pools:
                yield (*where, "burst"), _unknown("pool", burst, spec.pools)
                continue
            if most < model.replicas:
                yield (*where, "max"), f"{most}, and the floor (replicas) is {model.replicas}."
            taken[burst] = taken.get(burst, 0) + max(0, most - model.replicas) * model.devices
        if model.devices % model.nodes:
            yield (
                ("models", name, "nodes"),
                f"{model.devices} devices cannot be shared evenly by {model.nodes}.",
            )
        if model.start == "eager" and model.keep_alive is not None:
            yield ("models", name, "keep_alive"), "needs start: lazy, so that the model can come back."
        for flag in model.flags:
            plain = flag.replace("_", "-")
            if field := _FIELDS.get(plain):
                yield ("models", name, "flags", flag), f"write {field}: beside weights: instead."
            elif plain in _TAKEN:
                yield ("models", name, "flags", flag), "is decided by whoever starts the engine."
    for name, devices in taken.items():
        pool = spec.pools[name]
        # a model on cpu shares its machine; accelerators are not shared
        if pool.hardware != "cpu" and devices > pool.count:
            yield (
                ("pools", name, "count"),
                f"{pool.count} devices, but the models on it take {devices} (replicas x devices).",
            )


def _upstreams(spec: Spec) -> Iterator[Problem]:
    for name, upstream in spec.upstreams.items():
        where = ("upstreams", name)
        if upstream.pool is not None and upstream.pool not in spec.pools:
            yield (*where, "pool"), _unknown("pool", upstream.pool, spec.pools)
        if upstream.discover and (upstream.urls or not upstream.url.startswith("http://")):
            yield (*where, "discover"), "needs one url, of http: addresses have no certificates."
        if upstream.trusts_gateway and (upstream.kind != "penstock" or upstream.api_key_env is None):
            yield (*where, "trusts_gateway"), "needs kind: penstock, and api_key_env."
        if upstream.priorities and upstream.kind != "vllm":
            yield (*where, "priorities"), f"needs kind: vllm; {upstream.kind} schedules in another way."
        if upstream.files and upstream.kind not in ("openai", "penstock"):
            yield (*where, "files"), f"needs kind: openai or penstock; {upstream.kind} has no /v1/files."
        if not upstream.models:
            yield (*where, "models"), "names no model that it serves."
        for header in upstream.headers:
            if header.lower() in _SECRET:
                yield (*where, "headers", header), "a key does not belong into the file; use api_key_env."


def _routes(spec: Spec) -> Iterator[Problem]:
    names: dict[str, str] = {}
    for name, route in spec.routes.items():
        for alias in (name, *route.aliases):
            if alias in names:
                yield ("routes", name), f"{alias} is also a name of the route {names[alias]}."
            names[alias] = name
        for index, match in enumerate(route.match):
            if not match.headers and not match.tags:
                yield ("routes", name, "match", index), "names neither headers nor tags, and so no request."
        for field in ("targets", "fallback", "shadow"):
            for index, target in enumerate(getattr(route, field)):
                yield from _target(spec, ("routes", name, field, index), target, route)
        if not any(target.weight for target in route.targets):
            yield ("routes", name, "targets"), "all have the weight 0, and nobody would be asked."
        if route.escalate is not None:
            yield from _escalation(spec, name, route, route.escalate)
        for index, target in enumerate(route.shadow):
            if target.weight > 1:
                yield ("routes", name, "shadow", index, "weight"), "is a probability, at most 1."
        if route.comparator is not None:
            where = ("routes", name, "comparator")
            yield from _target(spec, where, route.comparator, None)
            upstream = spec.upstreams.get(route.comparator.upstream or "")
            served = None if upstream is None else upstream.models.get(route.comparator.model)
            if served is not None and served.price is None:
                yield where, f"{route.comparator.model} of {route.comparator.upstream} has no price."
            if route.comparator.upstream is None:
                yield where, "must name an upstream; a model of ours has no price by tokens."


def _escalation(spec: Spec, name: str, route: Route, escalation: Escalation) -> Iterator[Problem]:
    where = ("routes", name, "escalate")
    if escalation.to and not any(target.weight for target in escalation.to):
        yield (*where, "to"), "all have the weight 0, and nobody would be asked."
    for index, target in enumerate(escalation.to):
        yield from _target(spec, (*where, "to", index), target, route)
    if escalation.route is not None:
        other = spec.routes.get(escalation.route)
        if other is None:
            yield (*where, "route"), _unknown("route", escalation.route, spec.routes)
        elif escalation.route == name:
            yield (*where, "route"), "is the route itself; name one whose targets are dearer."
        elif other.escalate is not None:
            yield (*where, "route"), f"{escalation.route} escalates itself; that is done once only."
        elif route.local_only:
            for target in (*other.targets, *other.fallback):
                yield from _target(spec, (*where, "route"), target, route)
    names: set[str] = set()
    for index, verifier in enumerate(escalation.verifiers):
        here = (*where, "verifiers", index)
        called = verifier.name or verifier.kind
        if called in names:
            yield here, f"{called} is also the name of another verifier; give it a name:."
        names.add(called)
        try:
            if verifier.json_schema is not None:
                Schema(verifier.json_schema)
            for pattern in (verifier.regex, verifier.not_regex):
                if pattern is not None:
                    Pattern(pattern)
        except ValueError as error:
            yield (*here, verifier.kind), f"{error}."


def _target(
    spec: Spec, where: tuple[str | int, ...], target: Target, route: Route | None
) -> Iterator[Problem]:
    if target.upstream is None:
        if target.model not in spec.models:
            yield (*where, "model"), _unknown("model", target.model, spec.models)
        return
    upstream = spec.upstreams.get(target.upstream)
    if upstream is None:
        yield (*where, "upstream"), _unknown("upstream", target.upstream, spec.upstreams)
        return
    if target.model not in upstream.models:
        yield (*where, "model"), _unknown(f"model of {target.upstream}", target.model, upstream.models)
    if route is not None and route.local_only and not upstream.in_house:
        yield where, f"the route is local_only, and {target.upstream} is not in the house."


def _teams(spec: Spec) -> Iterator[Problem]:
    known = {*spec.routes, *spec.models}
    for name, team in spec.teams.items():
        for index, route in enumerate(team.routes or ()):
            if route not in known:
                yield ("teams", name, "routes", index), _unknown("route", route, known)


def _ledger(spec: Spec) -> Iterator[Problem]:
    kinds = {"url": ("sqlite", "postgresql", "postgres"), "counters": ("redis", "rediss", "unix")}
    for field, schemes in kinds.items():
        url = getattr(spec.ledger, field)
        if url is None:
            continue
        scheme, found, rest = url.partition("://")
        if not found or scheme.partition("+")[0] not in schemes:
            yield ("ledger", field), f"is no URL of {' or '.join(schemes[:2])}."
        elif field == "url" and ":" in rest.partition("@")[0].partition("/")[0] and "@" in rest:
            yield (
                ("ledger", field),
                "a password does not belong into the file; set PENSTOCK_LEDGER_PASSWORD.",
            )


def _gateway(spec: Spec) -> Iterator[Problem]:
    for index, proxy in enumerate(spec.gateway.trusted_proxies):
        if proxy == "unix":
            continue
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            yield ("gateway", "trusted_proxies", index), f"{quote(proxy)} is no address and no network."
    if (spec.gateway.ssl_certfile is None) != (spec.gateway.ssl_keyfile is None):
        yield ("gateway",), "ssl_certfile and ssl_keyfile belong together."
    for index, hook in enumerate(spec.gateway.hooks):
        for route in hook.routes or ():
            if route not in spec.routes and route not in spec.models:
                yield (
                    ("gateway", "hooks", index, "routes"),
                    _unknown("route", route, {*spec.routes, *spec.models}),
                )


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    if near := meant(name, known, 0.5):
        return f"there is no {what} {name}. {near}"
    return f"there is no {what} {name}; there is {', '.join(sorted(known)) or 'none'}."


def _cluster(spec: Spec) -> Iterator[Problem]:
    for name, pool in spec.pools.items():
        where = ("pools", name)
        if pool.mig is not None and pool.time_slicing is not None:
            yield (*where, "time_slicing"), "a slice (mig) is not shared further; choose one."
        if pool.hardware == "cpu":
            for field in ("mig", "time_slicing"):
                if getattr(pool, field) is not None:
                    yield (*where, field), "needs a GPU; this pool's hardware is cpu."
    entry = spec.cluster.entry
    if entry is not None:
        where = ("cluster", "entry")
        if entry.kind == "gateway-api" and entry.class_name is None:
            yield (*where, "class_name"), "the name of the Gateway that the route joins must be given."
        if entry.tls is not None and (entry.tls.issuer is None) == (entry.tls.secret is None):
            yield (*where, "tls"), "give exactly one of issuer and secret."
    if (
        spec.cluster.gateway_replicas is not None
        and spec.cluster.gateway_replicas > 1
        and not spec.ledger.url.startswith("postgresql")
    ):
        yield (
            ("cluster", "gateway_replicas"),
            "several gateways need a ledger in PostgreSQL (ledger: {url: postgresql://…}).",
        )
