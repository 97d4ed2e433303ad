"""Metrics of several processes on one page: each counts in files of its own, and a page adds the files up.

    share(directory, "api1")      in each process, under another name, before its Metrics are made
    …                             counters and histograms add up; gauges by the mode they are declared with
    page ◀── merged(directory)    in any of them

It is prometheus_client's multiprocess mode: what a process has counted stays when it dies, however that
comes. A process that takes the place of a dead one, under its name, counts on in the same files. Without
`share`, everything is in memory, and nothing here takes part.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_directory: Path | None = None


def share(directory: Path, process: str) -> None:
    """Let the metrics that are made from now on count in files in this directory.

    process: letters and digits; one at a time has the name.
    """
    global _directory
    directory.mkdir(mode=0o700, exist_ok=True)
    _directory = directory
    os.environ[_VARIABLE] = str(directory)  # where the library looks for it
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]


def shared() -> bool:
    """Whether there are other processes."""
    return _directory is not None


def merged() -> CollectorRegistry:
    """What all of them have counted."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(_directory))  # type: ignore[no-untyped-call]
    return registry


def died(process: str) -> None:
    """Drop the gauges of what a process that is gone had in hand (modes that begin with "live")."""
    mark_process_dead(process, str(_directory))  # type: ignore[no-untyped-call]
