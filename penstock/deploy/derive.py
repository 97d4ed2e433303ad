"""The gateway's own penstock.yaml: engines of the cluster are upstreams, and the rest is as it was.

    models.chat on pools.a100  ─▶  upstreams.chat: http://chat.llm-serving.svc:8000, on the same pool
    targets: [{model: chat}]   ─▶  targets: [{model: chat, upstream: chat}]
    (no route named chat)      ─▶  routes.chat, since models may be asked for by their own names

What is written is read again by the loader, so that the gateway of the cluster cannot refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator

from penstock.spec import Spec, loads
from penstock.spec.units import NANO, nanodollars

from .objects.yaml import dump
from .workloads import ENGINE_KEY, Bundle

STATE = "/var/lib/penstock"
"""Folder of the ledger and of its journals."""
CONFIG = "/etc/penstock"
"""Folder of the file."""


def derived(bundle: Bundle, urls: Mapping[str, Sequence[str]] | None = None) -> str:
    """The text. Raises SpecError if the loader would refuse it.

    Args:
        urls: model → base URLs of its replicas; the model's Service if not given.
    """
    spec = bundle.spec
    plain = plain_spec(spec)
    for gone in ("models", "jobs", "cluster"):
        plain.pop(gone, None)
    plain["upstreams"] = {**_engines(bundle, urls), **plain.get("upstreams", {})}
    plain["routes"] = _routes(bundle, plain.get("routes", {}))
    plain["gateway"] = _gateway(bundle, plain.get("gateway", {}))
    if urls is not None:  # flags say where it listens, which is behind a proxy
        for said in ("host", "port"):
            del plain["gateway"][said]
    plain["ledger"] = _ledger(bundle, plain.get("ledger", {}))
    text = dump({"version": 1, **plain})
    loads(text, "the gateway's penstock.yaml")
    return text


def upstream_name(bundle: Bundle, model: str) -> str:
    """What a model's engines are called among the upstreams."""
    slug = bundle.slugs[model]
    return slug if slug not in bundle.spec.upstreams else f"engines-{slug}"


def _engines(bundle: Bundle, urls: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, model in bundle.spec.models.items():
        workload = bundle.of(bundle.slugs[name])[0]
        own = model.engine == "penstock"
        service = f"http://{workload.slug}.{bundle.namespace}.svc:{workload.port}"
        first, *others = urls[name] if urls is not None else (service,)
        found[upstream_name(bundle, name)] = {
            "url": first,
            **({"discover": True} if urls is None else {}),
            **({"urls": others} if others else {}),
            "kind": model.engine,
            "api_key_env": ENGINE_KEY,
            **({"trusts_gateway": True} if own else {"priorities": True}),
            "pool": model.pool,
            "devices": model.devices,
            "models": {name: {"context": workload.max_model_len}},
        }
    return found


def _routes(bundle: Bundle, routes: Mapping[str, Any]) -> dict[str, Any]:
    """Targets get their upstream; models that are no route become one."""
    found = {name: _retargeted(bundle, route) for name, route in routes.items()}
    taken = {alias for name, route in routes.items() for alias in (name, *route.get("aliases", ()))}
    for name in bundle.spec.models:
        if name not in taken:
            found[name] = {"targets": [{"model": name, "upstream": upstream_name(bundle, name)}]}
    return found


def _retargeted(bundle: Bundle, route: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(route)
    for field in ("targets", "fallback", "shadow"):
        if field in route:
            changed[field] = [_target(bundle, each) for each in route[field]]
    if "escalate" in route and "to" in route["escalate"]:
        changed["escalate"] = {
            **route["escalate"],
            "to": [_target(bundle, each) for each in route["escalate"]["to"]],
        }
    return changed


def _target(bundle: Bundle, target: Mapping[str, Any]) -> dict[str, Any]:
    if target.get("upstream") is not None:
        return dict(target)
    return {**target, "upstream": upstream_name(bundle, target["model"])}


def _gateway(bundle: Bundle, gateway: Mapping[str, Any]) -> dict[str, Any]:
    """It listens on the pod's address, and prints no key. TLS ends at the entry: files of this machine are
    not in the pod."""
    kept = {key: value for key, value in gateway.items() if key not in ("ssl_certfile", "ssl_keyfile")}
    changed = {
        "first_key": False,  # logs are collected and kept: no secret is ever in them
        **kept,
        "host": "0.0.0.0",
        "port": bundle.gateway.port,
    }
    if changed.get("admin") and changed["admin"].get("port") is not None:
        changed["admin"] = {**changed["admin"], "host": "0.0.0.0"}
    return changed


def _ledger(bundle: Bundle, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """SQLite and the journals are on the gateway's volume."""
    changed = {**ledger, "spool": f"{STATE}/spool"}
    if bundle.gateway.database == "sqlite":
        name = PurePosixPath(bundle.spec.ledger.url.partition("://")[2]).name or "penstock.db"
        changed["url"] = f"sqlite:///{STATE}/{name}"
    return changed


def plain_spec(spec: Spec) -> dict[str, Any]:
    """What a spec says, as YAML has it; what it leaves to defaults is left out."""
    plain: dict[str, Any] = _plain(spec)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: _dollars(getattr(value, name))
            if _is_money(fields[name].metadata, fields[name].annotation)
            else _plain(getattr(value, name))
            for name in fields
            if name in value.model_fields_set and getattr(value, name) is not None
        }
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return value


def _is_money(metadata: Any, annotation: Any) -> bool:
    """Whether a field is in nanodollars, which are written as dollars."""
    if any(isinstance(each, BeforeValidator) and each.func is nanodollars for each in metadata):
        return True
    return any(
        _is_money(getattr(each, "__metadata__", ()), each)
        for each in get_args(annotation)
        if each is not annotation
    )


def _dollars(value: int | None) -> Any:
    """12500000000 → 12.5, exactly: as text where a float would not be."""
    if value is None:
        return None
    amount = Decimal(value) / NANO
    if amount == int(amount):
        return int(amount)
    return float(amount) if Decimal(repr(float(amount))) == amount else str(amount)
