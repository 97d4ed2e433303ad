"""What the process of an engine finds in its environment: settings that libraries read once, as they start.

What the user has set stands.
"""

from __future__ import annotations

from collections.abc import MutableMapping

#: Tensors in pages of 2 MiB: one core reads weights up to a third faster (docs/log.md).
_HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
#: OpenMP threads look for work so long, some tenths of a millisecond, before they sleep (libgomp's word, and
#: that of libomp and libiomp5, in milliseconds). That saves waking them between two operations of a step;
#: threads that spin for long would take the cores from the API process.
_SPINS = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}


def prepare(environment: MutableMapping[str, str], threads: int | None = None) -> None:
    """Complete the environment of a process that will compute; of this one before torch is imported."""
    environment.setdefault(*_HUGE_PAGES)
    if "OMP_WAIT_POLICY" not in environment:
        for name, value in _SPINS.items():
            environment.setdefault(name, value)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
