"""`penstock.yaml`: whether it is right, and whether what it describes is wise.

The first is the loader's word (penstock.spec), with its lines; everything else here is advice on a spec that
can be used.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from penstock.core.errors import StartupError
from penstock.spec import Spec
from penstock.spec.load import said
from penstock.spec.model import Limits, Model, Pool
from penstock.spec.references import problems

from . import engines, flags
from .engines import LONG, LONG_CONTEXT
from .finding import Finding, Rule, Severity, Word
from .sources import Document, dig, documents_of

INVALID = Rule(
    "spec-invalid",
    Severity.ERROR,
    "a penstock.yaml that cannot be used",
    "`penstock up`, `penstock gateway` and `penstock compile` refuse it.",
    "Correct this entry; docs/spec.md has all of them.",
)
UNCAPPED = Rule(
    "route-uncapped",
    Severity.WARNING,
    "a route without a ceiling for max_tokens",
    "One request without a bound of its own holds the engine up to the end of the context.",
    "Give the route max_tokens: {ceiling: N, default: M}.",
)
UNLIMITED = Rule(
    "team-unlimited",
    Severity.WARNING,
    "keys without any limit",
    "One loop of one client takes all capacity, and spends without end.",
    "Give limits: or teams.NAME.limits: requests_per_minute, tokens_per_minute, dollars_per_day or "
    "gpu_hours_per_month.",
)
UNTAGGED = Rule(
    "features-unlimited",
    Severity.NOTE,
    "no feature has a limit of its own",
    "Costs by feature are in the ledger, but one feature may use up the budget of all.",
    "Give tags: {feature: {NAME: {limits: …}}}.",
)
PLAIN = Rule(
    "gateway-plain",
    Severity.WARNING,
    "keys and prompts go over the network in plain text",
    "Whoever is on the way reads them.",
    "Give gateway.ssl_certfile and ssl_keyfile, cluster.entry.tls, or bind to 127.0.0.1 behind a proxy "
    "with TLS.",
)
FIT = Rule(
    "model-does-not-fit",
    Severity.ERROR,
    "a model that does not fit its devices",
    "The engine ends at its start, out of memory; or nothing stays for the KV cache.",
    "Choose a larger device, more of them (devices:), or a quantization; `penstock plan` lists what does.",
)
SCHEME = Rule(
    "quantization-unserved",
    Severity.ERROR,
    "a quantization that the engine cannot make of these weights",
    "The engine ends at its start: it does not know the name, or the weights are not in that format.",
    "Name weights that come so (…-AWQ, …-GPTQ-Int4, …-quantized.w8a8), or leave quantization out; vLLM makes "
    "fp8 of 16-bit weights at load, and our engine int8 and int4, and fp8 on GPUs that multiply it.",
)
SINGLE = Rule(
    "single-replica",
    Severity.NOTE,
    "a model with one replica",
    "While it starts, fails or is updated, nobody is served.",
    "Give replicas: 2 or scale: {max: …}, or a fallback in the routes that lead to it.",
)
PRICE = Rule(
    "price-undated",
    Severity.WARNING,
    "a price without a date or a source",
    "Nobody can tell whether it still holds, and with it every figure of costs.",
    "Give price_as_of and price_source.",
)
SLICING = Rule(
    "time-slicing-served",
    Severity.WARNING,
    "models that users wait for share a device by time-slicing",
    "Pods take turns on the device without walls between them: latency cannot be promised, and one takes "
    "another's memory.",
    "Use whole devices or MIG slices (mig:); keep time_slicing for development.",
)
LEAVES = Rule(
    "route-leaves-house",
    Severity.NOTE,
    "requests of this route may leave the house",
    "A fallback, an escalation or a shadow leads to somebody else's server.",
    "Where the data must stay, say local_only: true at the route, the team or the tag.",
)
RULES = (
    INVALID,
    UNCAPPED,
    UNLIMITED,
    UNTAGGED,
    PLAIN,
    FIT,
    SCHEME,
    SINGLE,
    PRICE,
    SLICING,
    LEAVES,
)

CORE = frozenset("pools models upstreams routes teams".split())
_OPEN = frozenset(("0.0.0.0", "::", "[::]"))


def is_spec(document: Document) -> bool:
    """Whether a document is a penstock.yaml: by its file's name, or by its sections."""
    data = document.data
    if not isinstance(data, dict) or "apiVersion" in data:
        return False
    if posixpath.basename(document.path) in ("penstock.yaml", "penstock.yml"):
        return True
    core = [key for key in CORE & set(data) if isinstance(data[key], dict)]
    own = len(set(Spec.model_fields) & set(data))
    return own * 2 > len(data) and (len(core) >= 2 or (bool(core) and "version" in data))


def rules_of(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """What is wrong with a document, if it is a penstock.yaml."""
    if dig(document.data, "kind") == "ConfigMap":
        yield from _mounted(document)
    if not is_spec(document):
        return
    spec, wrong = _validated(document)
    yield from wrong
    if spec is None:
        return
    yield from _routes(document, spec)
    yield from _limits(document, spec)
    yield from _gateway(document, spec)
    for name, pool in spec.pools.items():
        if pool.price_per_hour is not None and (pool.price_as_of is None or pool.price_source is None):
            missing = "price_as_of" if pool.price_as_of is None else "price_source"
            yield document.finding(PRICE, f"It has no {missing}.", "pools", name, "price_per_hour")
        if (illegal := _illegal_slice(pool)) is not None:
            yield document.finding(FIT, illegal, "pools", name, "mig")
    for name, model in spec.models.items():
        if model.pool in spec.pools:
            yield from _model(document, spec, name, model, spec.pools[model.pool])


def _validated(document: Document) -> tuple[Spec | None, list[Finding]]:
    """The spec, unless a value of it has none; and what the gateway would refuse."""
    try:
        spec = Spec.model_validate(document.data)
    except ValidationError as error:
        return None, [_invalid(document, path, what) for path, what in said(error)]
    return spec, [_invalid(document, path, what) for path, what in problems(spec)]


def _mounted(document: Document) -> Iterator[Finding]:
    """A gateway's file in a ConfigMap: whether the gateway would start with it."""
    text = dig(document.data, "data", "penstock.yaml")
    if not isinstance(text, str) or "{{" in text:
        return
    first, _ = document.value_at("data", "penstock.yaml")
    documents, broken = documents_of(text, document.path, line=first)
    yield from (replace(each, rule=INVALID) for each in broken)
    for each in documents:
        yield from _validated(each)[1]


def _invalid(document: Document, path: Sequence[str | int], what: str) -> Finding:
    where = ".".join(map(str, path))
    shown = f"{where[:200]}: {what}" if where else what
    return document.finding(INVALID, shown[:1].upper() + shown[1:] if not where else shown, *path)


def _routes(document: Document, spec: Spec) -> Iterator[Finding]:
    for name, route in spec.routes.items():
        if route.max_tokens.ceiling is None:
            yield document.finding(UNCAPPED, f"Route {name} has no max_tokens.ceiling.", "routes", name)
        if route.local_only:
            continue
        dearer = route.escalate.to if route.escalate else ()
        if route.escalate is not None and route.escalate.route in spec.routes:
            dearer = spec.routes[route.escalate.route].targets
        away = [
            target.upstream
            for target in (*route.fallback, *dearer, *route.shadow)
            if target.upstream in spec.upstreams and not spec.upstreams[target.upstream].in_house
        ]
        local = all(target.upstream is None for target in route.targets)
        if away and local:
            what = f"Its targets are ours, and {away[0]} gets what they cannot answer."
            yield document.finding(LEAVES, what, "routes", name)


def _limits(document: Document, spec: Spec) -> Iterator[Finding]:
    if not spec.routes and not spec.models:
        return
    everybody = spec.limits != Limits()
    unlimited = [
        name
        for name, team in spec.teams.items()
        if not everybody and team.limits == Limits() and team.key_limits == Limits()
    ]
    for name in unlimited:
        yield document.finding(UNLIMITED, f"Team {name} has no limits, nor do its keys.", "teams", name)
    if not spec.teams and not everybody:
        yield document.finding(UNLIMITED, "There are neither limits: nor teams with some.")
    features = spec.tags.get("feature", {})
    if spec.routes and not any(tag.limits != Limits() for tag in features.values()):
        yield document.finding(UNTAGGED, "tags.feature has no limits.", "tags")


def _gateway(document: Document, spec: Spec) -> Iterator[Finding]:
    gateway = spec.gateway
    entry = spec.cluster.entry
    if gateway.host in _OPEN and gateway.ssl_certfile is None and (entry is None or entry.tls is None):
        yield document.finding(PLAIN, f"host: {gateway.host} without a certificate.", "gateway", "host")
    elif entry is not None and entry.tls is None:
        yield document.finding(PLAIN, f"{entry.host} is served without TLS.", "cluster", "entry")


def _model(document: Document, spec: Spec, name: str, model: Model, pool: Pool) -> Iterator[Finding]:
    where = ("models", name)
    length = model.max_model_len
    wanted = max((route.context or 0 for route in _leading_to(spec, name)), default=0)
    if length is not None and length >= LONG_CONTEXT > wanted:
        what = f"max_model_len is {length:,} tokens, and no route to it says such a context:."
        yield document.finding(
            LONG, what, *where, "max_model_len", fix="Set max_model_len to the longest request."
        )
    if model.replicas == 1 and model.scale is None and pool.hardware != "cpu":
        yield document.finding(SINGLE, f"{name} has one replica, and no scale.", *where)
    if pool.time_slicing is not None:
        yield document.finding(
            SLICING,
            f"{name} is on pool {model.pool}, whose devices {pool.time_slicing} pods share.",
            *where,
            "pool",
        )
    with contextlib.suppress(StartupError):
        if (unserved := _unserved(model, pool)) is not None:
            yield document.finding(SCHEME, f"{model.quantization}: {unserved}.", *where, "quantization")
    with contextlib.suppress(StartupError, ValueError, OSError):
        if (problem := _unfit(spec, name)) is not None:
            yield document.finding(FIT, f"{model.weights} on {pool.mig or pool.hardware}: {problem}.", *where)
    yield from _flags(document, where, model)


def _unserved(model: Model, pool: Pool) -> str | None:
    """Why the engine cannot have the weights in that scheme. Raises StartupError for a device that the
    catalogue does not have."""
    from penstock.fleet import catalogue, schemes

    if model.quantization is None:
        return None
    native = None
    if model.weights != "demo" and not model.weights.startswith((".", "/", "~")):
        with contextlib.suppress(StartupError):
            native = catalogue.find_model(model.weights).native
    device = catalogue.find_device(pool.hardware)
    return schemes.unserved(model.engine, model.quantization, native, device)


def _illegal_slice(pool: Pool) -> str | None:
    """Why a pool's devices cannot be cut so."""
    from penstock.fleet import catalogue
    from penstock.fleet.options import legal_profiles

    if pool.mig is None:
        return None
    try:
        device = catalogue.find_device(pool.hardware)
    except StartupError:
        return None
    if device.profile(pool.mig) is not None:
        return None
    return f"{device.name} has no slice {pool.mig}; it has {legal_profiles(device)}."


def _leading_to(spec: Spec, name: str) -> Iterator[Any]:
    for route in spec.routes.values():
        if any(
            target.upstream is None and target.model == name for target in (*route.targets, *route.fallback)
        ):
            yield route


def _unfit(spec: Spec, name: str) -> str | None:
    """Why a model's weights and one request do not fit, by the planner's reading of the spec; None if they
    do. Raises StartupError for a model or device that the catalogues do not have."""
    from penstock.fleet.asked import of_spec, whole
    from penstock.fleet.candidates import consider, schemes_of
    from penstock.fleet.load import Targets

    model = spec.models[name]
    if spec.pools[model.pool].hardware == "cpu" or model.weights.startswith(("demo", ".", "/", "~")):
        return None
    question = whole(replace(of_spec(spec, name), targets=Targets()))
    found = consider(question, question.devices[0], question.tp or 1, next(schemes_of(question)))
    unfit = question.facts.tp_problem(found.tp) is not None or not found.room.fits
    return found.problem if unfit else None


def _flags(document: Document, where: tuple[str, ...], model: Model) -> Iterator[Finding]:
    """Flags of the engine, as on its command line."""
    words: list[Word] = []
    given: Mapping[str, Any] = model.flags
    for key, value in given.items():
        line, column = document.at(*where, "flags", key)
        if value is False:
            words.append(Word(f"--no-{key}", line, column))
            continue
        words.append(Word(f"--{key}", line, column))
        if value is not True and value is not None:
            word = document.word(*where, "flags", key)
            words.append(Word(word.text or "…$", word.line, word.column))
    table = flags.vllm() if model.engine == "vllm" else flags.penstock()["serve"]
    yield from engines.of_flags(words, table, document.path)
