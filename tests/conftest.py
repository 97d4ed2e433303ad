"""For all tests: threads, offline hub, and hypothesis without luck."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports Triton: its kernels are interpreted where there is no GPU, slowly, and no other way.
if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Before anything imports torch: workers share the cores, and spinning threads would fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no failure because a machine is busy; HYPOTHESIS_PROFILE=explore looks
# for new ones.
_BUSY = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=_BUSY)
settings.register_profile("explore", deadline=None, suppress_health_check=_BUSY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# What imports and the collection of thousands of tests make stays: looking at it again and again for garbage
# took a sixth of that time, and would take more in all full collections afterwards.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on there is garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _shared_servers() -> Iterator[None]:
    """What tests of several rooms share ends with the last one."""
    yield
    if stores := sys.modules.get("tests.gateway.stores"):
        stores.stop()
