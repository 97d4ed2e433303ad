"""Libraries that were compiled ahead of use: which there are, and which of them a processor can run.

    csrc ── make wheel ──▶ prebuilt/<variant>.so in a wheel ── fitting() ──▶ library.py loads and checks it

There is a variant for every set of instructions for which csrc has code of its own, in one table, the best
first (no processor has AVX-VNNI, and AVX-512 without VNNI). AMX has no entry, since csrc has no code for it:
such a processor takes avx512-bf16, and oneDNN has its tiles. One below AVX2 has none either, and compiles.
Nor have a checkout and a source distribution any files here: they compile as ever, so that a changed source
never meets a library of the one before it.

Knows names of features and files, and nothing of torch. It loads nothing: what a processor cannot run is not
even named.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import build

DIRECTORY = Path(__file__).parent / "prebuilt"


@dataclass(frozen=True, slots=True)
class Variant:
    """One library of a wheel.

    Attributes:
        name: of its file.
        machine: the architecture, as platform.machine() has it.
        options: of the compiler: which instructions it may use.
        needs: all of these, in the words of /proc/cpuinfo. Linux names a feature only if it also saves the
            registers that belong to it.
    """

    name: str
    machine: str
    options: tuple[str, ...]
    needs: frozenset[str]

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags: those of a library for this machine, for other instructions, and without symbols."""
        return (*(flag for flag in build.FLAGS if flag != "-march=native"), *self.options, "-s")

    @property
    def file_name(self) -> str:
        """Of the library, in DIRECTORY."""
        return f"{self.name}.so"


def _x86(name: str, level: int, *features: str) -> Variant:
    """A level of the x86-64 ABI, and features beyond it."""
    needs = "pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm xsave avx avx2 fma f16c bmi1 bmi2 abm movbe".split()
    if level == 4:
        needs += "avx512f avx512bw avx512cd avx512dq avx512vl".split()
    options = (f"-march=x86-64-v{level}", *(f"-m{feature.replace('_', '')}" for feature in features))
    return Variant(name, "x86_64", options, frozenset([*needs, *features]))


def _arm(name: str, march: str, features: str = "") -> Variant:
    """An Arm architecture with its extensions, and what it has beyond the first one with 64 bits."""
    return Variant(name, "aarch64", (f"-march={march}",), frozenset(["fp", "asimd", *features.split()]))


#: Every variant; of one architecture, the best first.
VARIANTS = (
    _x86("avx512-bf16", 4, "avx512_vnni", "avx512_bf16"),
    _x86("avx512-vnni", 4, "avx512_vnni"),
    _x86("avx512", 4),
    _x86("avx2-vnni", 3, "avx_vnni"),
    _x86("avx2", 3),
    _arm("neon-i8mm", "armv8.2-a+i8mm", "atomics crc32 asimdrdm i8mm"),
    _arm("neon", "armv8-a"),
)


def variants(machine: str) -> list[Variant]:
    """What is compiled for an architecture, the best first."""
    return [variant for variant in VARIANTS if variant.machine == machine]


def runnable(machine: str, features: Iterable[str]) -> list[Variant]:
    """What a processor with these features can run, the best first."""
    return [variant for variant in variants(machine) if variant.needs.issubset(features)]


def fitting() -> list[Path]:
    """The files that are there and that this processor can run, the best first."""
    found = [DIRECTORY / variant.file_name for variant in runnable(platform.machine(), build.cpu_features())]
    return [path for path in found if path.exists()]
