"""What the routes of files and batches share: the store, and the worker on it."""

from __future__ import annotations

from dataclasses import dataclass

from .store import BatchStore
from .worker import BatchWorker


@dataclass(frozen=True, slots=True)
class Desk:
    """Of a server with --batch-dir."""

    store: BatchStore
    worker: BatchWorker
    most_bytes: int
    """Of a file."""
