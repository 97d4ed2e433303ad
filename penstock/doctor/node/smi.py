"""What `nvidia-smi` says of a machine's devices.

    nvidia-smi -q -x                                   driver, CUDA, devices, MIG, memory, errors, throttling
    nvidia-smi --query-gpu=uuid,compute_cap --format=csv,noheader    what the former does not have

Its XML has changed names over the years (clocks_throttle_reasons, clocks_event_reasons; power_readings,
gpu_power_readings); those that are read here are the same from version 11 of its format to 13, or are looked
for under both names.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, replace

_SECONDS = 30.0
_LARGEST = 16 << 20
_MIB = 1 << 20

ARCHITECTURES = {
    "Kepler": 3.5,
    "Maxwell": 5.0,
    "Pascal": 6.0,
    "Volta": 7.0,
    "Turing": 7.5,
    "Ampere": 8.0,
    "Ada Lovelace": 8.9,
    "Hopper": 9.0,
    "Blackwell": 10.0,
}
"""The least compute capability of each; what a driver before 510 leaves to say
(developer.nvidia.com/cuda-gpus)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A MIG device."""

    index: int
    memory: int
    """Bytes."""
    multiprocessors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device; what it does not tell is None."""

    index: int
    name: str
    uuid: str
    architecture: str = ""
    memory: int | None = None
    """Bytes."""
    used: int | None = None
    capability: float | None = None
    mig: bool | None = None
    """None where it has no MIG."""
    mig_pending: bool | None = None
    slices: tuple[Slice, ...] = ()
    persistence: bool | None = None
    temperature: int | None = None
    """Degrees Celsius."""
    compute_mode: str = ""
    uncorrectable: int = 0
    """Errors of its memory since the driver was loaded."""
    damaged: tuple[str, ...] = ()
    """Why it should be replaced or reset: rows that could not be remapped, pages to be retired."""
    slowed: tuple[str, ...] = ()
    """Why its clocks are low, where that is trouble: heat, power."""
    processes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Smi:
    """All of it."""

    driver: str = ""
    cuda: str = ""
    """The newest version that the driver serves."""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    """Why there is nothing: in its own words."""
    installed: bool = True
    """Whether there is such a program."""


def ask(program: str = "nvidia-smi") -> Smi:
    """Run it. Never raises: what went wrong is the answer."""
    found = shutil.which(program)
    if found is None:
        return Smi(installed=False, problem=f"there is no {program}")
    text, problem = _run(found, "-q", "-x")
    if text is None:
        return Smi(problem=problem)
    try:
        smi = read(text)
    except ValueError as error:
        return Smi(problem=f"nvidia-smi -q -x: {error}")
    listed, _ = _run(found, "--query-gpu=uuid,compute_cap", "--format=csv,noheader")
    return with_capabilities(smi, capabilities(listed or ""))


def _run(program: str, *flags: str) -> tuple[str | None, str]:
    try:
        done = subprocess.run([program, *flags], capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"nvidia-smi has not answered after {_SECONDS:g} s: a device hangs"
    except OSError as error:
        return None, f"nvidia-smi cannot be run: {error.strerror or error}"
    text = done.stdout[:_LARGEST].decode("utf-8", "replace")
    if done.returncode:
        said = " ".join((text + done.stderr.decode("utf-8", "replace")).split())
        return None, said[:300] or f"nvidia-smi has ended with {done.returncode}"
    return text, ""


def read(text: str) -> Smi:
    """Read the answer to `-q -x`. Raises ValueError where it is none."""
    if len(text) > _LARGEST or "<!ENTITY" in text:
        raise ValueError("it is not what nvidia-smi writes")
    try:
        root = ElementTree.fromstring(text.strip())
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML ({error})") from None
    if root.tag != "nvidia_smi_log":
        raise ValueError(f"it is a {root.tag[:40]}")
    gpus = tuple(_gpu(index, each) for index, each in enumerate(root.findall("gpu")))
    return Smi(driver=_text(root, "driver_version"), cuda=_text(root, "cuda_version"), gpus=gpus)


def capabilities(text: str) -> dict[str, float]:
    """UUID → compute capability, of the answer to `--query-gpu=uuid,compute_cap`."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(GPU-\S+)\s*,\s*(\d+\.\d+)\s*", line)
        if match:
            found[match[1]] = float(match[2])
    return found


def with_capabilities(smi: Smi, known: Mapping[str, float]) -> Smi:
    """With what is known of each; else the least of its architecture."""
    gpus = tuple(
        replace(gpu, capability=known.get(gpu.uuid, ARCHITECTURES.get(gpu.architecture))) for gpu in smi.gpus
    )
    return replace(smi, gpus=gpus)


def _gpu(index: int, it: ElementTree.Element) -> Gpu:
    mode = _text(it, "mig_mode/current_mig")
    pending = _text(it, "mig_mode/pending_mig")
    return Gpu(
        index=index,
        name=_text(it, "product_name"),
        uuid=_text(it, "uuid"),
        architecture=_text(it, "product_architecture"),
        memory=_mib(it, "fb_memory_usage/total"),
        used=_mib(it, "fb_memory_usage/used"),
        mig=_switch(mode),
        mig_pending=_switch(pending),
        slices=tuple(_slice(each) for each in it.findall("mig_devices/mig_device")),
        persistence=_switch(_text(it, "persistence_mode")),
        temperature=_number(it, "temperature/gpu_temp"),
        compute_mode=_text(it, "compute_mode"),
        uncorrectable=sum(
            int(each.text or 0)
            for each in it.findall("ecc_errors/volatile/*")
            if "uncorrectable" in each.tag and (each.text or "").strip().isdigit()
        ),
        damaged=tuple(_damage(it)),
        slowed=tuple(_slowed(it)),
        processes=len(it.findall("processes/process_info")),
    )


def _slice(it: ElementTree.Element) -> Slice:
    return Slice(
        index=_number(it, "index") or 0,
        memory=_mib(it, "fb_memory_usage/total") or 0,
        multiprocessors=_number(it, "device_attributes/shared/multiprocessor_count") or 0,
    )


def _damage(it: ElementTree.Element) -> list[str]:
    found = []
    for path, what in (
        ("remapped_rows/remapped_row_failure", "a row of its memory could not be remapped"),
        ("remapped_rows/remapped_row_pending", "rows of its memory wait for a reset to be remapped"),
        ("retired_pages/pending_retirement", "pages of its memory wait for a reset to be retired"),
        ("retired_pages/pending_blacklist", "pages of its memory wait for a reset to be retired"),
        ("gpu_reset_status/reset_required", "it needs a reset"),
    ):
        if _text(it, path) == "Yes" and what not in found:
            found.append(what)
    action = _text(it, "gpu_recovery_action")
    if action not in ("", "None", "N/A"):
        found.append(f"its driver asks for: {action}")
    return found


_TROUBLE = {
    "hw_slowdown": "the hardware slows it down",
    "hw_thermal_slowdown": "it is too hot",
    "sw_thermal_slowdown": "it is too hot",
    "hw_power_brake_slowdown": "the power supply brakes it",
}
"""Reasons for low clocks that are trouble; idleness and power caps are none."""


def _slowed(it: ElementTree.Element) -> list[str]:
    found: list[str] = []
    for group in ("clocks_event_reasons", "clocks_throttle_reasons"):
        for each in it.findall(f"{group}/*"):
            name = re.sub(r"^clocks_(event|throttle)_reason_", "", each.tag)
            what = _TROUBLE.get(name)
            if what and (each.text or "").strip() == "Active" and what not in found:
                found.append(what)
    return found


def _text(it: ElementTree.Element, path: str) -> str:
    return (it.findtext(path) or "").strip()[:200]


def _number(it: ElementTree.Element, path: str) -> int | None:
    match = re.match(r"-?\d+", _text(it, path))
    return int(match[0]) if match else None


def _mib(it: ElementTree.Element, path: str) -> int | None:
    value = _number(it, path)
    return None if value is None else value * _MIB


def _switch(text: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text)
