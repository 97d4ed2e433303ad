"""Compiling: once, in one piece, and never a reason not to start."""

from __future__ import annotations

import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels.cpu import build, library
from penstock.kernels.cpu.binding import Library
from penstock.kernels.cpu.build import BuildError
from penstock.kernels.create import create_operations

CPU = torch.device("cpu")

#: Stands for a compiler: logs its calls, and writes what it is told to the file after -o.
_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "{version}"; exit 0; fi
case "$*" in *" -shared "*) echo linked >> "{log}" ;; esac
while [ "$1" != -o ]; do shift; done
{work}
"""


class Compiler:
    """A fake compiler, chosen by CXX, over an empty cache."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._log = directory / "log"
        self.cache = directory / "cache"
        self.install()
        monkeypatch.setenv("PENSTOCK_CACHE", str(self.cache))
        monkeypatch.setenv("CXX", str(directory / "cxx"))

    def install(self, work: str = 'echo library > "$2"', version: str = "1.0") -> None:
        script = self._directory / "cxx"
        script.write_text(_COMPILER.format(log=self._log, work=work, version=version))
        script.chmod(0o755)

    @property
    def calls(self) -> int:
        """How often it has linked a library."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path, monkeypatch)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that wants the library and has not asked for it yet."""
    monkeypatch.delenv("PENSTOCK_CPU_KERNELS", raising=False)
    monkeypatch.setattr(library._State, "library", None)
    monkeypatch.setattr(library._State, "settled", False)
    monkeypatch.setattr(library._State, "builder", None)


def test_it_is_compiled_once(compiler: Compiler) -> None:
    assert build.find_library() is None
    path = build.build()
    assert build.build() == path == build.find_library()
    assert path.read_text() == "library\n"
    assert compiler.calls == 1
    assert not list(compiler.cache.glob("building-*"))


def test_many_at_a_time_compile_once(compiler: Compiler) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: build.build(), range(8)))
    assert len(paths) == 1
    assert compiler.calls == 1


def test_another_compiler_or_other_flags_make_another_library(compiler: Compiler) -> None:
    first = build.build()
    compiler.install(version="2.0")
    assert build.find_library() is None
    paths = {first, build.build(), build.build((*build.FLAGS, "-g"))}
    assert len(paths) == compiler.calls == 3


def test_changed_sources_make_another_library(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build()
    for path in build.SOURCE_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "simd.h").open("a") as header:
        header.write("\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    assert build.build() != first


def test_without_a_compiler_an_earlier_library_serves(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_library() == path


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        ('echo "x.cpp:1: error: no such register" >&2; exit 1', "error: no such register"),
        ("exit 3", "failed"),
    ],
)
def test_a_failing_compiler(compiler: Compiler, work: str, complaint: str) -> None:
    compiler.install(work)
    with pytest.raises(BuildError, match=complaint) as caught:
        build.build()
    assert "CXX" in caught.value.advice
    assert not list(compiler.cache.glob("*.so"))


@pytest.mark.parametrize("hangs_at", ["version", "probe"])
def test_a_compiler_that_hangs_is_found_out_and_waited_for_once(
    compiler: Compiler,
    fresh: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    hangs_at: str,
) -> None:
    monkeypatch.setattr(build, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr(build, "_hanging", set())
    if hangs_at == "version":
        (tmp_path / "cxx").write_text("#!/bin/sh\nexec sleep 60\n")
        monkeypatch.setattr(library, "WAIT_SECONDS", 0.0)
        library.start_build()
        assert library.available() is None
        (warning,) = warnings_of(caplog)
        assert "cxx hangs: it does nothing for 0.2 s" in warning
        with pytest.raises(BuildError, match="hangs"):
            build.target()
    else:
        compiler.install("exec sleep 60")
        with pytest.raises(BuildError, match=r"cxx hangs.*CXX"):
            build.build()


def test_no_compiler(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(BuildError, match=r"No C\+\+ compiler.*install g\+\+"):
        build.build()


def test_a_cache_that_cannot_be_written(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="Set PENSTOCK_CACHE to a writable directory"):
        build.build()


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PENSTOCK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "penstock"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_dir() == Path.home() / ".cache" / "penstock"


def test_the_command_says_what_it_did(compiler: Compiler, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main() == 0
    assert "compiled in" in capsys.readouterr().out
    assert build.main() == 0
    assert "there already" in capsys.readouterr().out
    compiler.install("exit 1", version="broken")
    assert build.main() == 1
    assert "not built" in capsys.readouterr().err


def test_a_background_build(compiler: Compiler, fresh: None) -> None:
    library.start_build()
    assert library._State.builder is not None
    assert library._State.builder.wait(timeout=60) == 0
    assert build.find_library() is not None
    library._wait(60)
    assert library._State.builder is None


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        ('echo "not an ELF file" > "$2"', "OSError"),
        ("echo 'x.cpp:1: error: too old' >&2; exit 1", "error: too old"),
    ],
)
def test_what_does_not_work_costs_one_warning(
    compiler: Compiler, fresh: None, caplog: pytest.LogCaptureFixture, work: str, reason: str
) -> None:
    compiler.install(work)
    assert create_operations(CPU, torch.bfloat16).name == "torch"
    assert create_operations(CPU, torch.bfloat16).name == "torch"
    (warning,) = warnings_of(caplog)
    assert "all runs through torch's operators" in warning
    assert reason in warning
    with pytest.raises(StartupError, match="not available"):
        create_operations(CPU, torch.bfloat16, attention="cpu")


def test_no_compiler_costs_one_warning_with_advice(
    compiler: Compiler, fresh: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.start_build()  # has nothing to say yet
    assert library.available() is None
    (warning,) = warnings_of(caplog)
    assert "no-such-compiler" in warning
    assert "apt-get install g++" in warning


def test_a_slow_compiler_is_not_waited_for(
    compiler: Compiler, fresh: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        stderr = None

        def communicate(self, timeout: float) -> None:
            raise subprocess.TimeoutExpired("cxx", timeout)

    monkeypatch.setattr(build, "start_build", Slow)
    assert library.available() is None
    (warning,) = warnings_of(caplog)
    assert "next start" in warning


def test_wrong_results_are_refused(
    fresh: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build.find_library() is None:
        pytest.skip("not compiled here")
    honest = library.Library.__init__

    def wrong(self: library.Library, path: Path) -> None:
        honest(self, path)
        monkeypatch.setattr(self, "attention", lambda *_: None)  # leaves the output as it was

    monkeypatch.setattr(library.Library, "__init__", wrong)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    assert library.available() is None
    (warning,) = warnings_of(caplog)
    assert "self-test" in warning


def test_the_environment_can_do_without(
    fresh: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_CPU_KERNELS", "0")
    library.start_build()
    assert create_operations(CPU, torch.bfloat16).name == "torch"
    assert library.available() is None
    assert not warnings_of(caplog)


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_file_that_was_cut_off_is_refused_before_it_is_mapped(tmp_path: Path, kept: float) -> None:
    """Touching what is not there would end the process with SIGBUS."""
    found = library.available()
    if found is None:
        pytest.skip("no kernels here")
    data = found.path.read_bytes()
    count = int(len(data) * kept) if isinstance(kept, float) else kept
    (tmp_path / "cut.so").write_bytes(data[:count])
    with pytest.raises(OSError, match=r"cut off|no 64-bit ELF file"):
        Library(tmp_path / "cut.so")


def test_auto_takes_the_kernels_for_what_they_compute() -> None:
    if library.available(120) is None:
        pytest.skip("no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
    assert create_operations(CPU, torch.bfloat16).name == "cpu"
    assert create_operations(CPU, torch.float16).name == "torch"
