"""The catalogues and the rules of thumb, for a terminal or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from . import catalogue
from .documents import claims
from .facts import SCHEMES
from .record import dollars
from .table import count, gb, money


def models(*, as_json: bool = False) -> str:
    """Every model: size, cache, context."""
    rows: list[dict[str, Any]] = []
    for id in catalogue.models():
        facts = catalogue.find_model(id)
        rows.append(
            {
                "id": id,
                "architecture": facts.architecture,
                "kind": facts.kind,
                "parameters": facts.parameters,
                "active_parameters": facts.active_parameters,
                "weight_bytes_16_bit": facts.weight_bytes(SCHEMES["none"]),
                "kv_bytes_per_token": facts.kv_bytes_per_token(),
                "context_length": facts.context_length,
                "published_as": facts.native,
                "checked": catalogue.models()[id]["checked"],
            }
        )
    if as_json:
        return json.dumps(rows, indent=2)
    table = [("model", "parameters", "of a token", "at 16 bits", "KV a token", "context", "config")]
    table += [
        (
            row["id"],
            count(row["parameters"]),
            count(row["active_parameters"]),
            gb(row["weight_bytes_16_bit"]),
            f"{row['kv_bytes_per_token'] / 1024:,.0f} KiB" if row["kv_bytes_per_token"] else "-",
            f"{row['context_length']:,}",
            "compared" if row["checked"] else "written from memory",
        )
        for row in rows
    ]
    return (
        _aligned(table)
        + "\n\nconfig: whether another copy of config.json was found, and agrees; --json names "
        "it. A folder with the real one is planned\nin place of the catalogue's. Parameters equal those that "
        "transformers counts from the same config."
    )


def hardware(*, as_json: bool = False) -> str:
    """Every device, with its prices and where they are from."""
    devices = catalogue.devices().values()
    if as_json:
        return json.dumps(
            [
                {
                    "name": device.name,
                    "memory": device.memory,
                    "bandwidth": device.bandwidth,
                    "flops": dict(device.flops),
                    "interconnect": device.interconnect,
                    "compute_capability": device.capability or None,
                    "source": device.source,
                    "checked": device.checked,
                    "mig": [profile.name for profile in device.mig],
                    "prices": [
                        {
                            "dollars_per_hour": dollars(price.per_hour),
                            "as_of": price.as_of.isoformat(),
                            "source": price.source,
                            "offer": price.what,
                        }
                        for price in device.prices
                    ],
                }
                for device in devices
            ],
            indent=2,
        )
    table = [
        ("device", "memory", "bandwidth", "16-bit FLOP/s", "capability", "MIG", "an hour", "as of, offer")
    ]
    for device in devices:
        price = device.price
        table.append(
            (
                device.name,
                gb(device.memory),
                f"{device.bandwidth / 1e9:,.0f} GB/s",
                f"{device.rate / 1e12:,.3g} T",
                f"{device.capability}" if device.capability else "-",
                f"{len(device.mig)} profiles" if device.mig else "-",
                money(dollars(price.per_hour)) if price else "-",
                f"{price.as_of}, {price.what}" if price else "no dated price",
            )
        )
    return _aligned(table)


def figures(*, as_json: bool = False) -> str:
    """What the documents say, and what is true."""
    found = claims()
    if as_json:
        return json.dumps(
            [
                {
                    "number": each.number,
                    "what": each.what,
                    "said": each.said,
                    "value": each.value,
                    "unit": each.unit,
                    "verdict": each.verdict,
                    "why": each.why,
                }
                for each in found
            ],
            indent=2,
        )
    table = [("", "what", "said", "true", "", "")]
    table += [(each.number, each.what, each.said, each.shown, each.verdict, each.why) for each in found]
    return _aligned(table)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )
