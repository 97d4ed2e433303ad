"""A restore drill: whether a version, copied to another place as a restore would do it, could be served.

copy the bytes ─▶ sha256 of each ─▶ config.json ─▶ the header of each safetensors file ─▶ seconds
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.errors import PenstockError, StartupError
from penstock.files import read_json

from .local import copy
from .manifest import Manifest
from .store import free_bytes, unwritable

_HEADER = 100 << 20
"""Bytes of the largest header that safetensors' own reader takes."""


@dataclass(slots=True)
class Drill:
    """What it has shown."""

    version: str
    size: int
    """Bytes."""
    files: int = 0
    tensors: int = 0
    architecture: str = ""
    restored: float = 0.0
    """Seconds for copying and checking."""
    opened: float = 0.0
    """Seconds for configuration and headers."""
    problems: list[str] = field(default_factory=list)


def run(
    folder: Path,
    manifest: Manifest,
    scratch: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Drill:
    """Do it in a folder of its own, which is removed again. Raises StartupError where there is no room."""
    found = Drill(manifest.version, manifest.size)
    where = scratch or Path(tempfile.gettempdir())
    if (free := free_bytes(where)) < manifest.size:
        raise StartupError(
            f"A drill copies {manifest.size / 1e9:,.1f} GB, and {where} has {free / 1e9:,.1f} GB free.",
            param="--scratch",
            advice="Name a folder on another disk: --scratch DIR.",
        )
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="penstock-drill-", dir=where) as name:
            target = Path(name)
            begun = clock()
            for file in manifest.files:
                (target / file.path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    digest = copy(folder / file.path, target / file.path)
                except FileNotFoundError:
                    found.problems.append(f"{file.path} is missing")
                    continue
                if digest != file.sha256:
                    found.problems.append(f"{file.path} is damaged")
                found.files += 1
            found.restored = clock() - begun
            begun = clock()
            _open(target, manifest, found)
            found.opened = clock() - begun
    except OSError as error:
        raise unwritable(where, error, manifest.size) from error
    return found


def _open(folder: Path, manifest: Manifest, found: Drill) -> None:
    from penstock.model.checkpoint import find_safetensors

    try:
        config = read_json(folder / "config.json")
        found.architecture = ", ".join(map(str, config.get("architectures") or [])) or "not named"
        _, shards = find_safetensors(folder)
    except PenstockError as error:
        found.problems.append(error.message)
        shards = [folder / file.path for file in manifest.files if file.path.endswith(".safetensors")]
    for shard in shards:
        try:
            found.tensors += header(shard)
        except (OSError, ValueError) as error:
            found.problems.append(f"{shard.name}: {error}")


def header(path: Path) -> int:
    """Tensors that a safetensors file names, each within the file. Raises ValueError, OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is too short for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if not 2 <= length <= min(_HEADER, size - 8):
            raise ValueError(f"its header would have {length:,} bytes")
        try:
            named = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError("its header is no JSON") from None
    if not isinstance(named, dict):
        raise ValueError("its header is no JSON object")
    tensors = {name: each for name, each in named.items() if name != "__metadata__"}
    for name, each in tensors.items():
        try:
            begin, end = each["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"the tensor {name!r} has no place in it") from None
        if not 0 <= begin <= end <= size - 8 - length:
            raise ValueError(f"the tensor {name!r} reaches beyond its end")
    return len(tensors)
