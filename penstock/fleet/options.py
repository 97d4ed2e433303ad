"""Whole devices, slices of devices, or taking turns: the same models, side by side.

    A  whole devices       each model its own
    B  MIG                 slices with memory and multiprocessors of their own; sizes are fixed
    C  time-slicing        processes take turns on one device: for development, refused for production

The recommendation is the documents' rule with a number: B while its slices carry the load and cost less, A
from the volume on at which they no longer do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.core.errors import StartupError

from .candidates import Candidate, consider, schemes_of
from .hardware import COMPUTE_SLICES, Device, MigProfile, pack
from .question import Question

TIME_SLICING = (
    "Processes that take turns wait for one another: latency is unpredictable, memory is shared without a "
    "wall between them, and one that takes too much ends the others. For development only."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Instances of one profile for one model."""

    model: str
    profile: MigProfile
    count: int
    candidate: Candidate
    """The model in such a slice."""

    @property
    def kv_tokens(self) -> int:
        return self.candidate.room.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One of the three."""

    letter: str
    title: str
    device: Device | None
    devices: int
    per_hour: int | None
    """Nanodollars."""
    usable: Mapping[str, float]
    """Model → requests a second that it can take, with its targets."""
    throughput: str
    isolation: str
    production: bool
    independent_scaling: bool
    complexity: str
    why: str
    slices: tuple[Slice, ...] = ()
    layout: tuple[tuple[str, ...], ...] = ()
    """Of each device, its slices."""

    @property
    def possible(self) -> bool:
        return self.devices > 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The three, and which."""

    options: tuple[Option, ...]
    recommended: str
    reason: str
    move_at: Mapping[str, float]
    """Model → requests a second from which on A carries what B does not; empty where B is not possible."""


def legal_profiles(device: Device) -> str:
    """For messages."""
    return ", ".join(profile.name for profile in device.mig) or "none: it cannot be cut"


def profile_named(device: Device, name: str, where: str = "--mig") -> MigProfile:
    """A slice by name; `where` it was said. Raises StartupError that lists what is legal."""
    plain = name.removeprefix("nvidia.com/").removeprefix("mig-").lower()
    found = device.profile(plain)
    if found is None:
        raise StartupError(
            f"{where}: {name!r} is no MIG profile of {device.name}.",
            param=where,
            advice=f"It has {legal_profiles(device)}.",
        )
    return found


def in_slices(question: Question, device: Device) -> tuple[tuple[MigProfile, Candidate], ...]:
    """The model in each kind of slice."""
    sliced = replace(question, tp=1, price_per_hour=None, count=None)
    scheme = next(schemes_of(question))
    found = []
    for profile in device.mig:
        if profile.compute == COMPUTE_SLICES:  # that is the device
            continue
        found.append((profile, consider(sliced, device.sliced(profile), 1, scheme)))
    return tuple(found)


def compare(questions: Sequence[Question], whole: Sequence[Candidate | None], device: Device) -> Comparison:
    """The three options for these models on that kind of device.

    Args:
        whole: the best way on whole devices, of each question.
        device: what would be cut.
    """
    options = (_whole(questions, whole), _slices(questions, device), _turns(questions, device))
    a, b, _ = options
    move_at = dict(b.usable) if b.possible else {}
    if not a.possible and not b.possible:
        return Comparison(options, "none", "No option keeps what is asked for.", move_at)
    if not b.possible:
        return Comparison(options, "A", b.why, move_at)
    if not a.possible:
        return Comparison(options, "B", a.why, move_at)
    cheaper = (
        (b.per_hour, b.devices) < (a.per_hour, a.devices)
        if a.per_hour and b.per_hour
        else (b.devices < a.devices)
    )
    if not cheaper:
        return Comparison(options, "A", "Slices would cost no less, and scale together.", move_at)
    limits = ", ".join(f"{rate:.2f} requests/s of {name}" for name, rate in move_at.items())
    reason = f"Slices carry this load for less. Move to A above {limits}, or when models must scale apart."
    return Comparison(options, "B", reason, move_at)


def _whole(questions: Sequence[Question], whole: Sequence[Candidate | None]) -> Option:
    able = [each for each in whole if each is not None]
    possible = len(able) == len(questions)
    prices = [each.costs.per_hour if each.costs else None for each in able]
    hour = sum(each for each in prices if each is not None) if possible and None not in prices else None
    missing = next((q.name for q, each in zip(questions, whole, strict=True) if each is None), "")
    return Option(
        letter="A",
        title="whole devices",
        device=able[0].device if possible else None,
        devices=sum(each.devices for each in able) if possible else 0,
        per_hour=hour,
        usable={
            question.name: each.usable * each.replicas
            for question, each in zip(questions, whole, strict=True)
            if each is not None
        }
        if possible
        else {},
        throughput="maximum",
        isolation="full",
        production=possible,
        independent_scaling=True,
        complexity="low",
        why="" if possible else f"There is no way to serve {missing} on whole devices.",
    )


def _slices(questions: Sequence[Question], device: Device) -> Option:
    def refused(why: str) -> Option:
        return Option(
            letter="B",
            title="MIG slices",
            device=device,
            devices=0,
            per_hour=None,
            usable={},
            throughput="good",
            isolation="memory and multiprocessors of its own",
            production=False,
            independent_scaling=False,
            complexity="medium",
            why=why,
        )

    if not device.mig:
        return refused(f"{device.name} cannot be cut into slices.")
    ways: list[list[Slice]] = []
    for question in questions:
        fitting = []
        nearest = ""
        for profile, candidate in in_slices(question, device):
            if candidate.ok:
                fitting.append(
                    Slice(model=question.name, profile=profile, count=candidate.replicas, candidate=candidate)
                )
            else:
                nearest = f"{profile.name}: {candidate.problem}"
        if not fitting:
            return refused(f"No slice of {device.name} holds {question.name} ({nearest}).")
        ways.append(fitting)
    best: tuple[tuple[int, float], tuple[Slice, ...], list[list[Slice]]] | None = None
    for choice in itertools.product(*ways):
        if sum(each.count for each in choice) > 64:
            continue
        gpus = _pack(choice)
        key = (len(gpus), float(sum(each.count * each.profile.memory_slices for each in choice)))
        if best is None or key < best[0]:
            best = (key, choice, gpus)
    if best is None:
        return refused("It would take more than 64 slices.")
    chosen, gpus = _widen(best[1], ways, len(best[2]))
    price = device.price
    return Option(
        letter="B",
        title="MIG slices",
        device=device,
        devices=len(gpus),
        per_hour=price.per_hour * len(gpus) if price else None,
        usable={each.model: each.candidate.usable * each.count for each in chosen},
        throughput="good",
        isolation="memory and multiprocessors of its own",
        production=True,
        independent_scaling=False,
        complexity="medium",
        why="",
        slices=chosen,
        layout=tuple(tuple(f"{each.profile.name} {each.model}" for each in gpu) for gpu in gpus),
    )


def _pack(choice: Sequence[Slice]) -> list[list[Slice]]:
    """All instances on as few devices as first fit, largest first, needs."""
    each = sorted(
        (part for part in choice for _ in range(part.count)),
        key=lambda part: (-part.profile.memory_slices, -part.profile.compute),
    )
    gpus: list[list[Slice]] = []
    for part in each:
        for gpu in gpus:
            if pack([other.profile for other in gpu] + [part.profile]) is not None:
                gpu.append(part)
                break
        else:
            gpus.append([part])
    return gpus


def _widen(
    chosen: tuple[Slice, ...], ways: Sequence[Sequence[Slice]], devices: int
) -> tuple[tuple[Slice, ...], list[list[Slice]]]:
    """Larger slices where they take no further device: what is left over serves nobody. The model with the
    most weights goes first."""
    order = sorted(range(len(chosen)), key=lambda index: -chosen[index].candidate.room.weights)
    for index in order:
        for wider in sorted(ways[index], key=lambda part: (part.profile.memory_slices, part.profile.compute)):
            now = chosen[index].profile
            if (wider.profile.memory_slices, wider.profile.compute) <= (now.memory_slices, now.compute):
                continue
            tried = (*chosen[:index], wider, *chosen[index + 1 :])
            if len(_pack(tried)) <= devices:
                chosen = tried
    return chosen, _pack(chosen)


def _turns(questions: Sequence[Question], device: Device) -> Option:
    """Time-slicing: what it would cost, and why it is refused."""
    memory = sum(
        consider(replace(question, tp=1), device, 1, next(schemes_of(question))).room.weights
        for question in questions
    )
    devices = max(1, math.ceil(memory / (0.9 * device.memory)))
    price = device.price
    return Option(
        letter="C",
        title="time-slicing",
        device=device,
        devices=devices,
        per_hour=price.per_hour * devices if price else None,
        usable={},
        throughput="degraded",
        isolation="none",
        production=False,
        independent_scaling=False,
        complexity="low",
        why=TIME_SLICING,
    )
