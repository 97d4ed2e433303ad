"""One wheel for all that need one for this machine: its libraries take half a minute to compile."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from penstock.kernels.cpu import build, prebuilt

from .wheels import HERE, build_wheel, environment_of, needed


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the best library for this processor and the foremost one of all; made by hatchling alone, as the
    first stage of the images does it."""
    pytest.importorskip("hatchling")
    fitting = prebuilt.runnable(HERE, build.cpu_features())
    if not fitting:
        pytest.skip("no library is compiled ahead for this processor")
    folder = tmp_path_factory.mktemp("wheel")
    alone = [importlib.metadata.distribution("hatchling"), *needed("hatchling").values()]
    python = environment_of(folder / "builder", alone)
    names = sorted({fitting[0].name, prebuilt.variants(HERE)[0].name})
    return build_wheel(HERE, names, folder / "dist", python)
