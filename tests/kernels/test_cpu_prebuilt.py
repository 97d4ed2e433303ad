"""Libraries that were compiled ahead: the right one for a processor, and never one that it cannot run."""

from __future__ import annotations

import logging
import platform
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels.cpu import build, library, prebuilt, self_test
from penstock.kernels.cpu.prebuilt import VARIANTS, runnable, variants

SSE = "fpu sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm xsave"
HASWELL = f"{SSE} fma movbe avx f16c abm bmi1 avx2 bmi2"
SKYLAKE = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
CASCADE_LAKE = f"{SKYLAKE} avx512_vnni"
COOPER_LAKE = f"{CASCADE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{COOPER_LAKE} amx_bf16 amx_tile amx_int8 avx512_fp16"
CORTEX_A53 = "fp asimd evtstrm crc32 cpuid"
NEOVERSE_N1 = f"{CORTEX_A53} aes atomics fphp asimdhp asimdrdm asimddp"
NEOVERSE_V1 = f"{NEOVERSE_N1} sve i8mm bf16"

PROCESSORS = {
    "Nehalem": ("x86_64", SSE, []),
    "Haswell": ("x86_64", HASWELL, ["avx2"]),
    "Alder Lake": ("x86_64", f"{HASWELL} avx_vnni", ["avx2-vnni", "avx2"]),
    "Knights Landing": ("x86_64", f"{HASWELL} avx512f avx512cd avx512er avx512pf", ["avx2"]),
    "AVX-512 without FMA": ("x86_64", SKYLAKE.replace(" fma ", " "), []),
    "Skylake": ("x86_64", SKYLAKE, ["avx512", "avx2"]),
    "Cascade Lake": ("x86_64", CASCADE_LAKE, ["avx512-vnni", "avx512", "avx2"]),
    "Zen 4": ("x86_64", COOPER_LAKE, ["avx512-bf16", "avx512-vnni", "avx512", "avx2"]),
    "Sapphire Rapids": ("x86_64", SAPPHIRE_RAPIDS, ["avx512-bf16", "avx512-vnni", "avx512", "avx2"]),
    "Cortex-A53": ("aarch64", CORTEX_A53, ["neon"]),
    "Neoverse N1": ("aarch64", NEOVERSE_N1, ["neon"]),
    "Neoverse V1": ("aarch64", NEOVERSE_V1, ["neon-i8mm", "neon"]),
    "another architecture": ("riscv64", "rv64gcv", []),
}
EVERYTHING = sorted({feature for variant in VARIANTS for feature in variant.needs})


class Machine:
    """A processor that is pretended, and a directory of files that are none of libraries."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.directory = directory
        for variant in VARIANTS:
            (directory / variant.file_name).write_text(variant.name)
        monkeypatch.setattr(prebuilt, "DIRECTORY", directory)
        monkeypatch.setenv("PENSTOCK_CACHE", str(directory / "cache"))
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.delenv("PENSTOCK_CPU_KERNELS", raising=False)
        monkeypatch.setattr(library._State, "library", None)
        monkeypatch.setattr(library._State, "settled", False)
        monkeypatch.setattr(library._State, "builder", None)
        self.become("Zen 4")
        self.opened: list[str] = []
        """Names of the files that were opened as libraries."""
        self.broken: set[str] = set()
        """Those that fail the self-test."""
        monkeypatch.setattr(library, "Library", self._open)
        monkeypatch.setattr(self_test, "check", self._check)

    def become(self, processor: str) -> None:
        machine, features, _ = PROCESSORS[processor]
        self._patch.setattr(platform, "machine", lambda: machine)
        self._patch.setattr(build, "cpu_features", lambda: features.split())

    def _open(self, path: Path) -> Path:
        self.opened.append(path.stem)
        return path

    def _check(self, path: Path) -> None:
        if path.stem in self.broken:
            raise RuntimeError(f"self-test of {path.stem}: error 1.0")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(("machine", "features", "names"), PROCESSORS.values(), ids=PROCESSORS)
def test_what_a_processor_can_run(machine: str, features: str, names: list[str]) -> None:
    assert [variant.name for variant in runnable(machine, features.split())] == names


@given(features=st.sets(st.sampled_from(EVERYTHING)), machine=st.sampled_from(["x86_64", "aarch64"]))
def test_it_has_all_that_is_needed(features: set[str], machine: str) -> None:
    found = runnable(machine, features)
    assert all(variant.needs <= features and variant.machine == machine for variant in found)
    assert found == [variant for variant in variants(machine) if variant.needs <= features]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_best_comes_first(machine: str) -> None:
    """None stands behind one that needs less; the last one runs wherever any of them does."""
    listed = variants(machine)
    assert not any(later.needs > earlier.needs for earlier, later in combinations(listed, 2))
    assert all(each.needs >= listed[-1].needs for each in listed)


@pytest.mark.parametrize("variant", variants(platform.machine()), ids=lambda variant: variant.name)
def test_a_compiler_uses_only_what_is_needed(variant: prebuilt.Variant) -> None:
    """Every instruction set that the options switch on is one that is asked of the processor."""
    compiler = build.find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no compiler that names what it uses")

    def macros(*options: str) -> set[str]:
        command = [*compiler, *options, "-dM", "-E", "-x", "c++", "/dev/null"]
        defined = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return {line.split()[1].strip("_").lower() for line in defined if line.endswith("__ 1")}

    as_linux_says = {"sse3": "pni", "lzcnt": "abm", "bmi": "bmi1", "lahf_sahf": "lahf_lm"}
    as_linux_says |= {
        "avxvnni": "avx_vnni",
        "avx512vnni": "avx512_vnni",
        "avx512bf16": "avx512_bf16",
        "crc32": "sse4_2",
    }
    no_features = {"gcc_have_sync_compare_and_swap_16"}  # cx16
    used = macros(*variant.options) - macros("-march=x86-64") - no_features
    assert {as_linux_says.get(name, name) for name in used} == variant.needs - {"cx16"}


def test_the_best_that_fits_is_loaded(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    library.start_build()
    assert library._State.builder is None
    assert library.available() == machine.directory / "avx512-bf16.so"
    assert machine.opened == ["avx512-bf16"]
    assert not caplog.records


@pytest.mark.parametrize("processor", PROCESSORS)
def test_nothing_is_opened_that_cannot_run(machine: Machine, processor: str) -> None:
    machine.become(processor)
    machine.broken = {variant.name for variant in VARIANTS}
    assert library.available() is None
    assert machine.opened == PROCESSORS[processor][2]


def test_the_next_one_stands_in_for_one_that_computes_nonsense(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.broken = {"avx512-bf16", "avx512-vnni"}
    assert library.available() == machine.directory / "avx512.so"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "avx512-bf16.so is not used. RuntimeError: self-test of avx512-bf16" in warnings[0]


def test_one_that_is_not_there_is_passed_over(machine: Machine) -> None:
    (machine.directory / "avx512-bf16.so").unlink()
    assert library.available() == machine.directory / "avx512-vnni.so"


def own_library(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that was compiled for this very machine."""
    path = machine.directory / "own.so"
    monkeypatch.setattr(build, "find_library", lambda: path)
    return path


def test_one_compiled_for_this_machine_comes_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.available() != own_library(machine, monkeypatch)
    monkeypatch.setattr(library._State, "settled", False)
    assert library.available() == own_library(machine, monkeypatch)


def test_one_of_the_wheel_stands_in_for_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own_library(machine, monkeypatch)
    machine.broken = {"own"}
    assert library.available() == machine.directory / "avx512-bf16.so"
    assert [record.getMessage() for record in caplog.records if "own.so is not used" in record.getMessage()]


def test_a_compiler_is_asked_last(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that cannot be trusted does not keep the compiler from its work."""
    compiler = machine.directory / "cxx"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit\nwhile [ $1 != -o ]; do shift; done\n: > $2\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    machine.become("Haswell")
    machine.broken = {"avx2"}
    monkeypatch.setattr(build, "start_build", lambda: CompilesHere())
    found = library.available()
    assert found == build.find_library()
    assert machine.opened == ["avx2", Path(str(found)).stem]


class CompilesHere:
    """Stands for the process of a background build."""

    returncode = 0

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        build.build()
        return b"", b""


def test_a_broken_compiler_is_no_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert library.available() == machine.directory / "avx512-bf16.so"


def test_without_any_a_warning_gives_advice(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.become("Nehalem")
    assert library.available() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "apt-get install g++" in record.getMessage()
