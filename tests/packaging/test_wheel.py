"""Wheels: what is in them, and that one runs where nothing compiles. The tool is tools/wheel/build.py.

Hardly optimised: compiled in two thirds of the time, from the same sources for the same instructions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from penstock.kernels.cpu import build, prebuilt

from .wheels import HERE, ROOT, build_wheel, run

#: What a library says of itself.
ISA = {
    "avx512-bf16": "AVX512-BF16",
    "avx512-vnni": "AVX512",
    "avx512": "AVX512",
    "avx2-vnni": "AVX2",
    "avx2": "AVX2",
    "neon-i8mm": "NEON",
    "neon": "NEON",
}

pytest.importorskip("hatchling")

#: Run by the installed package. A start would have the kernels compiled; then it asks for them.
_ASK = """
import json, penstock
from penstock.kernels.cpu import library
library.start_build()
found = library.available()
idle = library._State.builder is None
print(json.dumps([penstock.__file__, idle, str(found and found.path), found and found.isa]))
"""


def libraries_of(wheel: Path, to: Path) -> dict[str, Path]:
    """The libraries of a wheel, by the names of their variants."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return {Path(name).stem: Path(archive.extract(name, to)) for name in names}


def compile_self_test(compiler: str, to: Path) -> Path:
    source = Path(__file__).parent / "self_test.cpp"
    run(compiler, "-std=c++17", "-O1", "-Wno-psabi", f"-I{build.SOURCE_DIR}", "-o", to, source, "-ldl")
    return to


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_where_nothing_compiles(wheel: Path, tmp_path: Path) -> None:
    """Installed into an environment with torch and without a compiler, its best library is in use."""
    best, foremost = prebuilt.runnable(HERE, build.cpu_features())[0].name, prebuilt.variants(HERE)[0].name
    assert re.fullmatch(rf"penstock-[^-]+-py3-none-manylinux_2_\d+_{HERE}\.whl", wheel.name)

    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    # torch and its like from here; what is installed comes first, and a .pth file there is not followed
    (packages / "rest.pth").write_text(str(Path(torch.__file__).parents[1]))

    cache = tmp_path / "cache"
    environment = {"PATH": str(tmp_path / "empty"), "PENSTOCK_CACHE": str(cache), "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(python), "-c", _ASK], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "CPU kernels" not in done.stderr, "there was something to warn of"
    package, idle, path, isa = json.loads(done.stdout)
    assert Path(package).is_relative_to(packages)
    assert idle, "a compiler was started"
    assert path == str(packages / "penstock/kernels/cpu/prebuilt" / f"{best}.so")
    assert isa == ISA[best]
    assert not cache.exists()

    compiler = build.find_compiler()
    assert compiler is not None
    naive = compile_self_test(compiler[0], tmp_path / "self_test")
    libraries = libraries_of(wheel, tmp_path / "wheel")
    assert set(libraries) == {best, foremost}
    assert "attention of bfloat16" in run(naive, libraries[best])


@pytest.mark.slow
@pytest.mark.parametrize("machine", sorted({variant.machine for variant in prebuilt.VARIANTS} - {HERE}))
def test_libraries_for_another_architecture(machine: str, tmp_path: Path) -> None:
    """Under an emulator, the kernels compute what naive loops do. That is not a run on such a processor."""
    emulator = shutil.which(f"qemu-{machine}")
    if emulator is None:
        pytest.skip(f"qemu-{machine} is not installed (Debian: qemu-user)")
    # of AVX-512 and AVX-VNNI it knows nothing
    names = [v.name for v in prebuilt.variants(machine) if "avx512" not in v.name and "vnni" not in v.name]
    wheel = build_wheel(machine, names, tmp_path / "dist")
    naive = compile_self_test(f"{machine}-linux-gnu-g++", tmp_path / "self_test")
    libraries = libraries_of(wheel, tmp_path / "wheel")
    assert sorted(libraries) == sorted(names)
    for library in libraries.values():
        assert "attention of bfloat16" in run(emulator, "-L", f"/usr/{machine}-linux-gnu", naive, library)


def test_without_any_compiler_there_is_no_wheel(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "wheel" / "build.py"
    environment = os.environ | {"CXX": "no-such-compiler", "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tool), "--out", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert re.findall(r"(\w+): skipped", done.stdout) == ["x86_64", "aarch64"]
    assert not list(tmp_path.glob("*.whl"))


def test_the_source_distribution_can_be_compiled(tmp_path: Path) -> None:
    """It has every source, what builds a wheel of it, and no library."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(source.relative_to(ROOT)) for source in build.SOURCE_DIR.iterdir()}
    assert sources <= names
    assert {"pyproject.toml", "tools/wheel/build.py", "tools/wheel/hook.py"} <= names
    assert not [name for name in names if name.endswith(".so")]
