"""The bundled catalogues: models (config.json, as published), hardware with prices, published measurements.

Data files, read once. Whoever knows better passes a price or a folder: nothing here is looked up anywhere.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from penstock.core.errors import StartupError
from penstock.fleet.architectures import read_directory, read_facts
from penstock.fleet.facts import ModelFacts
from penstock.fleet.hardware import GIB, Device, MigProfile, Price


def _read(name: str) -> Any:
    return json.loads(resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))


@functools.cache
def models() -> Mapping[str, Mapping[str, Any]]:
    """Hugging Face id → aliases, config, parameters as transformers counts them, and what the config was
    compared with (None: nothing)."""
    entries: Mapping[str, Mapping[str, Any]] = _read("models.json")
    return entries


@functools.cache
def _names() -> Mapping[str, str]:
    """Any spelling, in lower case → id."""
    return {
        name.lower(): id
        for id, entry in models().items()
        for name in (id, id.rpartition("/")[2], *entry["aliases"])
    }


def find_model(name: str) -> ModelFacts:
    """Facts of a folder with a config.json, of a Hugging Face id or of a short name, as `qwen3-32b`.

    Raises StartupError where the catalogue has no such model, with those that are near; ModelLoadError for a
    folder that cannot be read.
    """
    path = Path(name)
    if path.is_dir() or name.startswith((".", "/", "~")):
        facts = read_directory(path.expanduser())
        return facts
    id = _names().get(name.lower())
    if id is None and (found := _quantised(name)) is not None:
        base, scheme = found
        return replace(read_facts(Path(base) / "config.json", models()[base]["config"], name), native=scheme)
    if id is None:
        near = difflib.get_close_matches(name.lower(), list(_names()), 3, 0.5)
        hint = f"Did you mean {', '.join(_names()[each] for each in dict.fromkeys(near))}? " if near else ""
        raise StartupError(
            f"{name!r} is neither a folder nor in the bundled catalogue of models.",
            advice=f"{hint}Name a folder with its config.json; `penstock plan --models` lists the catalogue.",
        )
    return read_facts(Path(id) / "config.json", models()[id]["config"], id)


def compared(name: str) -> bool:
    """Whether the config of a model of the catalogue agrees with another copy of it; True for what is not the
    catalogue's."""
    plain = _quantised(name)
    id = plain[0] if plain is not None else _names().get(name.lower())
    return id is None or models()[id]["checked"] is not None


_QUANTISED = (
    (re.compile(r"-(?:quantized\.w8a8|w8a8|int8|gptq-int8)$"), "int8"),
    (re.compile(r"-(?:awq|awq-int4)$"), "awq"),
    (re.compile(r"-(?:gptq|gptq-int4|quantized\.w4a16|w4a16|int4)$"), "gptq"),
    (re.compile(r"-(?:fp8|fp8-dynamic)$"), "fp8"),
    (re.compile(r"-(?:nvfp4|fp4)$"), "nvfp4"),
)
"""End of a name → scheme that such weights come in."""


def _quantised(name: str) -> tuple[str, str] | None:
    """(Model of the catalogue, scheme), for a name that says that it is one of them, quantised by somebody:
    RedHatAI/Qwen3-32B-quantized.w8a8. What its config.json says is not known here."""
    plain = name.lower().rpartition("/")[2]
    for ending, scheme in _QUANTISED:
        base = _names().get(ending.sub("", plain)) if ending.search(plain) else None
        if base is not None:
            return base, scheme
    return None


@functools.cache
def devices() -> Mapping[str, Device]:
    """Name → device."""
    return {name: _device(name, entry) for name, entry in _read("hardware.json").items()}


@functools.cache
def _device_names() -> Mapping[str, str]:
    entries = _read("hardware.json")
    return {
        spelling.lower(): name for name, entry in entries.items() for spelling in (name, *entry["aliases"])
    }


def find_device(name: str) -> Device:
    """A device by name or alias. Raises StartupError that lists what there is."""
    plain = name.lower().removeprefix("nvidia-").removeprefix("nvidia ")
    found = _device_names().get(plain)
    if found is None:
        raise StartupError(
            f"{name!r} is not in the catalogue of hardware.",
            param="--gpu",
            advice=f"It has {', '.join(devices())}.",
        )
    return devices()[found]


def measurements() -> tuple[Mapping[str, Any], ...]:
    """Published measurements that the roofline is fitted to; see backtest.py."""
    return tuple(_read("measurements.json"))


def _device(name: str, entry: Mapping[str, Any]) -> Device:
    return Device(
        name=name,
        vendor=entry["vendor"],
        memory=entry["memory_mib"] << 20,
        bandwidth=entry["bandwidth"],
        flops=entry["flops"],
        interconnect=entry["nvlink"],
        capability=entry["capability"],
        node=entry["node"],
        source=entry["source"],
        checked=entry.get("checked", ""),
        mig=tuple(
            MigProfile(
                name=profile["name"],
                compute=profile["compute"],
                memory_slices=profile["memory"],
                memory=int(profile["gib"] * GIB),
                share=profile["sms"] / entry["sms"],
                most=profile["most"],
                placements=tuple(profile["placements"]),
                estimated=profile.get("estimated", False),
            )
            for profile in entry.get("mig", ())
        ),
        prices=tuple(
            Price(
                per_hour=int(Decimal(price["dollars"]) * 10**9),
                as_of=datetime.date.fromisoformat(price["as_of"]),
                source=price["source"],
                what=price["what"],
                purchase=price["purchase"],
                node=price["node"],
            )
            for price in entry["prices"]
        ),
    )
