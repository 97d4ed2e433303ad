"""Builds wheels with the CPU kernels compiled ahead; `make wheel` calls it.

    python tools/wheel/build.py [--out DIR] [--quick] [--variants NAME,...] [MACHINE ...]

    csrc ── a compiler per architecture ──▶ <variant>.so … ── hatchling ──▶ dist/*.whl

One wheel per architecture (x86_64 and aarch64, unless some are named), and the source distribution. The
compiler is this machine's for its own architecture, else Debian's cross compiler MACHINE-linux-gnu-g++; where
there is none, the architecture is passed over with a message. Any Python 3 will do, since the libraries know
nothing of it; which systems will is read from the libraries.

Knows files, compilers and hatchling. What is compiled with which flags is the table in prebuilt.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from penstock.kernels.cpu import build, prebuilt  # noqa: E402

#: The newest versions of symbols that may be needed of the C++ runtime and the unwinder: those of GCC 8,
#: which come with the C library that torch asks for (2.28). They are not linked in: torch needs them as
#: well, and those of a new compiler would make ours ask for a newer C library (GCC 12's for 2.35).
_RUNTIME = {"GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
_NEEDED = re.compile(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)(?=\0)")


def main() -> int:
    """0 if a wheel was built for each architecture that there is a compiler for, and for one at least."""
    parser = argparse.ArgumentParser(description="Build wheels with the CPU kernels compiled ahead.")
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help="x86_64, aarch64; default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where they go; default: dist")
    parser.add_argument("--quick", action="store_true", help="hardly optimised: for tests of the packaging")
    parser.add_argument("--variants", metavar="NAME,...", help="only these: for tests, too")
    options = parser.parse_args()
    machines = list(dict.fromkeys(variant.machine for variant in prebuilt.VARIANTS))
    names = [variant.name for variant in prebuilt.VARIANTS]
    chosen = options.variants.split(",") if options.variants else names
    for wanted, known in ((options.machines, machines), (chosen, names)):
        unknown = set(wanted) - set(known)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    built = 0
    for machine in options.machines or machines:
        compiler = find_compiler(machine)
        if compiler is None:
            package = f"g++-{machine.replace('_', '-')}-linux-gnu"
            print(f"{machine}: skipped, there is no compiler for it (Debian: apt-get install {package})")
            continue
        with tempfile.TemporaryDirectory() as directory:
            variants = [variant for variant in prebuilt.variants(machine) if variant.name in chosen]
            if not variants:
                print(f"{machine}: skipped, it has none of the variants {', '.join(chosen)}")
                continue
            libraries = compile_variants(variants, compiler, Path(directory), options.quick)
            tag = platform_tag(machine, libraries)
            report(hatchling("wheel", options.out, directory, tag))
        built += 1
    report(hatchling("sdist", options.out))
    return 0 if built else 1


def find_compiler(machine: str) -> tuple[str, ...] | None:
    """The command of a compiler for an architecture."""
    if machine == platform.machine():
        return build.find_compiler()
    cross = f"{machine}-linux-gnu-g++"
    return (cross,) if shutil.which(cross) else None


def compile_variants(
    variants: list[prebuilt.Variant], compiler: tuple[str, ...], directory: Path, quick: bool
) -> list[Path]:
    """Compile variants of one architecture into a directory. Raises BuildError."""
    libraries = []
    for variant in variants:
        started = time.perf_counter()
        flags = tuple("-O1" if quick and flag == "-O3" else flag for flag in variant.flags)
        path = directory / variant.file_name
        build.compile_library(build.Target(compiler, flags, path))
        path.chmod(0o755)  # for all users, unlike one in a cache
        seconds = time.perf_counter() - started
        print(f"{variant.machine}: {path.name} {size(path)}, compiled in {seconds:.0f} s", flush=True)
        libraries.append(path)
    return libraries


def platform_tag(machine: str, libraries: list[Path]) -> str:
    """The tag of PEP 600: manylinux with the oldest C library that all of these can run on.

    An ELF file has the versions of the symbols that it needs in its table of strings. Raises SystemExit if
    they are those of a C++ runtime newer than what every such system has.
    """
    oldest = (2, 17)
    for path in libraries:
        for name, text in _NEEDED.findall(path.read_bytes()):
            version = tuple(int(part) for part in text.split(b"."))
            if name == b"GLIBC":
                oldest = max(oldest, version[:2])
            elif version > _RUNTIME[name.decode()]:
                sys.exit(f"{path} needs {name.decode()}_{text.decode()}: compile with an older compiler.")
    return f"manylinux_{oldest[0]}_{oldest[1]}_{machine}"


def hatchling(what: str, out: Path, libraries: str = "", tag: str = "") -> Path:
    """Have hatchling build a wheel with a directory of libraries, or the source distribution; its file."""
    environment = dict(os.environ)
    if libraries:
        environment |= {
            "HATCH_BUILD_HOOK_ENABLE_CUSTOM": "true",
            "PENSTOCK_WHEEL_LIBRARIES": libraries,
            "PENSTOCK_WHEEL_PLATFORM": tag,
        }
    command = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(out.resolve())]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}hatchling failed; `pip install hatchling` if it is missing.")
    return out / Path(done.stdout.split()[-1]).name  # it ends with the path that it made


def report(path: Path) -> None:
    """Say what was made."""
    print(f"{path} {size(path)}", flush=True)


def size(path: Path) -> str:
    """Of a file, in KiB."""
    return f"{path.stat().st_size / 1024:,.0f} KiB"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except build.BuildError as error:
        sys.exit(str(error))
