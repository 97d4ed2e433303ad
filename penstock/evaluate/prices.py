"""What the answers of a side cost: from a flag, or from a penstock.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import StartupError
from penstock.spec.model import Spec
from penstock.spec.units import nanodollars

from .sides import Local, Price, Remote


@dataclass(frozen=True, slots=True)
class TokenPrices:
    """Nanodollars for a million tokens."""

    input: int
    output: int
    cached_input: int | None = None
    per: int = 1_000_000


def read_price(text: str) -> Price:
    """`0.15:0.60` or `0.15:0.60:0.075`: US dollars for a million tokens in, out, in from a cache; `2.50/h`:
    for an hour of a device, by the device-seconds that Penstock's answers have. Raises ValueError."""
    if text.endswith("/h"):
        return Price(device_hour=_amount(text[:-2]), said=f"${text[:-2].strip().removeprefix('$')} an hour")
    parts = [_amount(part) for part in text.split(":")]
    if len(parts) not in (2, 3):
        raise ValueError(
            f"{text!r} is no price; write IN:OUT, IN:OUT:CACHED (per million tokens) or DOLLARS/h"
        )
    said = f"${text.split(':')[0]} in, ${text.split(':')[1]} out per million tokens"
    return Price(tokens=TokenPrices(*parts), said=said)


def price_in(spec: Spec, where: Remote | Local) -> Price:
    """That of an upstream with this URL and model, or of the pool of a model with these weights; none if the
    spec does not know it."""
    if isinstance(where, Local):
        for name, model in spec.models.items():
            pool = spec.pools[model.pool]
            if where.model in (name, model.weights) and pool.price_per_hour is not None:
                return Price(
                    device_hour=pool.price_per_hour * model.devices,
                    said=f"models.{name}, by the pool {model.pool}",
                )
        return Price()
    for name, upstream in spec.upstreams.items():
        if where.root.removesuffix("/v1") not in {
            url.rstrip("/").removesuffix("/v1") for url in (upstream.url, *upstream.urls)
        }:
            continue
        for model_name, served in upstream.models.items():
            if where.model in (None, served.name or model_name) and served.price is not None:
                if where.model is None and len(upstream.models) > 1:
                    raise StartupError(
                        f"The upstream {name} has several models.",
                        advice="Name the one that is asked, for its price.",
                    )
                said = f"upstreams.{name}.models.{model_name}, of {served.price.as_of}"
                return Price(tokens=served.price, said=said)
        if upstream.pool is not None and (hour := spec.pools[upstream.pool].price_per_hour) is not None:
            return Price(
                device_hour=hour * upstream.devices, said=f"upstreams.{name}, by the pool {upstream.pool}"
            )
    return Price()


def _amount(text: str) -> int:
    amount = nanodollars(text)
    if amount < 0:
        raise ValueError(f"{text!r} is below 0")
    return amount
