"""For all tests: threads, offline hub, and hypothesis without luck."""

import os

# Before anything imports torch: workers share the cores, and spinning threads would fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, settings

# The same examples in every run, and no failure because a machine is busy; HYPOTHESIS_PROFILE=explore looks
# for new ones.
_BUSY = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=_BUSY)
settings.register_profile("explore", deadline=None, suppress_health_check=_BUSY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
