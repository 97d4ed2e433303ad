"""Compiles the C++ kernels for this machine's processor, once; keeps them in the user's cache directory.

    python -m penstock.kernels.cpu.build      compile ahead of use; says what it did

The library's name holds two hashes: of sources, flags and the processor's features, and of the compiler. So a
new processor, a new Penstock or a new compiler compiles anew, and a machine without a compiler takes what an
earlier one left for the same processor (an image built elsewhere). Who asks for a library gets one, even if
one of a wheel would do (prebuilt.py): this one is for exactly this processor. Any number of processes may
build at the same time: a lock makes one of them compile, and the result appears under its name in one piece.

Environment: PENSTOCK_CACHE (or XDG_CACHE_HOME/penstock) is the directory, CXX the compiler.

Knows files and compilers. Knows nothing of torch, so that the background build starts in milliseconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
#: -ffast-math is out of the question: NaN must stay NaN, and the bits of a row must not depend on its batch.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-Wno-psabi")
_COMPILERS = ("g++", "clang++", "c++")
_COMPILE_SECONDS = 300
_PROBE_SECONDS = 5.0
"""For what takes a working compiler some tenths of a second: its version, and a program of one line."""
_hanging: set[tuple[str, ...]] = set()
"""Compilers that did not even tell their version in that time; nobody waits for them twice."""


class BuildError(Exception):
    """The library cannot be built: what is wrong, and what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason = reason
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Target:
    """One library: how it is compiled, and where it lies."""

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    path: Path


def cache_dir() -> Path:
    """Where libraries are kept; made on first use, for this user only. Raises BuildError if nobody says."""
    own = os.environ.get("PENSTOCK_CACHE")
    if own:
        return Path(own)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # "~" stays as it is for a user without a home
        raise BuildError("This user has no home directory.", "Set PENSTOCK_CACHE to a writable directory.")
    return Path(cache) / "penstock"


def find_compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler: CXX, or the first of g++, clang++ and c++ that is installed."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return tuple(chosen) if shutil.which(chosen[0]) else None
    for name in _COMPILERS:
        if shutil.which(name):
            return (name,)
    return None


def find_library(flags: tuple[str, ...] = FLAGS) -> Path | None:
    """The library for this machine if it has been built; where no compiler runs, by whichever built it."""
    try:
        path = target(flags).path
    except BuildError:
        found = sorted(cache_dir().glob(f"{_stem(flags)}-*.so"))
        return found[-1] if found else None
    return path if path.exists() else None


def target(flags: tuple[str, ...] = FLAGS) -> Target:
    """What would be compiled. Raises BuildError if there is no compiler, or it does not run."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"No C++ compiler was found ({os.environ.get('CXX') or ', '.join(_COMPILERS)}).",
            "Install one (Debian and Ubuntu: apt-get install g++).",
        )
    if compiler in _hanging:
        raise _hangs(compiler)
    try:
        version = subprocess.run(
            [*compiler, "--version"],
            capture_output=True,
            check=True,
            timeout=_PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        ).stdout
    except subprocess.TimeoutExpired as error:
        _hanging.add(compiler)
        raise _hangs(compiler) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler[0]} --version failed: {error}.", "Repair it, or set CXX.") from error
    digest = hashlib.sha256(version).hexdigest()[:12]
    return Target(compiler, flags, cache_dir() / f"{_stem(flags)}-{digest}.so")


def _hangs(compiler: tuple[str, ...]) -> BuildError:
    return BuildError(
        f"{compiler[0]} hangs: it does nothing for {_PROBE_SECONDS:g} s.",
        "Repair it, or set CXX to another one.",
    )


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """Path of the library, compiled now if need be. Raises BuildError."""
    wanted = target(flags)
    if wanted.path.exists():
        return wanted.path
    directory = wanted.path.parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(directory / f"{wanted.path.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not wanted.path.exists():  # another process may have been first
                compile_library(wanted)
    except OSError as error:
        raise BuildError(
            f"{directory} cannot be used: {error}.", "Set PENSTOCK_CACHE to a writable directory."
        ) from error
    return wanted.path


def start_build() -> subprocess.Popen[bytes]:
    """Build in a process of its own, which goes on if this one ends. Exit status 0 is success."""
    return subprocess.Popen(
        [sys.executable, "-m", "penstock.kernels.cpu.build"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def cpu_features() -> list[str]:
    """Feature names of the first processor as Linux gives them; elsewhere what names the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return sorted(value.split())
    except OSError:
        pass
    return [platform.processor()]


def compile_library(wanted: Target) -> None:
    """Compile in a temporary directory beside the target, file by file on all cores; rename the result.

    The directory must be there. Raises BuildError, and OSError if it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="building-", dir=wanted.path.parent) as directory:
        probe = Path(directory, "probe.cpp")
        probe.write_text("int main() { return 0; }\n")
        _run(wanted, ["-c", "-o", f"{directory}/probe.o", str(probe)], _PROBE_SECONDS)
        objects = {source: f"{directory}/{source.stem}.o" for source in sorted(SOURCE_DIR.glob("*.cpp"))}
        compiling = [["-c", "-o", target, str(source)] for source, target in objects.items()]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda arguments: _run(wanted, arguments), compiling):
                pass
        library = f"{directory}/{wanted.path.name}"
        _run(wanted, ["-shared", "-o", library, *objects.values()])
        os.chmod(library, 0o700)
        os.rename(library, wanted.path)


def _run(wanted: Target, arguments: list[str], seconds: float = _COMPILE_SECONDS) -> None:
    """Call the compiler. Raises BuildError with its first complaint."""
    try:
        done = subprocess.run(
            [*wanted.compiler, *wanted.flags, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        if seconds == _PROBE_SECONDS:
            raise _hangs(wanted.compiler) from error
        raise BuildError(f"{wanted.compiler[0]} took more than {seconds:g} s.", "Try again.") from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:500])
        raise BuildError(f"{wanted.compiler[0]} failed: {complaint.strip()}.", "Try another one with CXX.")


def _stem(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((flags, platform.machine(), cpu_features())).encode())
    return f"cpu-kernels-{digest.hexdigest()[:16]}"


def main() -> int:
    """Build, and print what was done; 0 even without a compiler would hide it, so the status is 1 then."""
    started = time.perf_counter()
    try:
        before = find_library()
        path = before or build()
    except BuildError as error:
        print(f"CPU kernels: not built. {error}", file=sys.stderr)
        return 1
    took = "there already" if before else f"compiled in {time.perf_counter() - started:.1f} s"
    print(f"CPU kernels: {path} ({took})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
