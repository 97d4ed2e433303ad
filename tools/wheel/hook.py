"""Hatchling's part in `make wheel`: puts the libraries in, and says for which systems they are.

Switched on by build.py alone; without it, a wheel is pure Python and compiles at the first start.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PrebuiltHook(BuildHookInterface):  # type: ignore[type-arg]
    """Environment: PENSTOCK_WHEEL_LIBRARIES, a directory of libraries; PENSTOCK_WHEEL_PLATFORM, their tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        libraries = Path(os.environ["PENSTOCK_WHEEL_LIBRARIES"])
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{os.environ['PENSTOCK_WHEEL_PLATFORM']}"
        for path in libraries.glob("*.so"):
            build_data["force_include"][str(path)] = f"penstock/kernels/cpu/prebuilt/{path.name}"
