"""The file that a rollout goes on from: what it is, how far it has come, and what happened.

Whoever reads and changes it holds a lock meanwhile; it is replaced as a whole, so that a machine that stops
in between leaves the old one. `promote` and `abort` may so be said while `start` runs, which hears of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock import writing
from penstock.core.errors import StartupError

Phase = Literal["running", "promoted", "aborted"]


class Event(msgspec.Struct, kw_only=True):
    """Something that happened."""

    at: float
    """Unix seconds."""
    share: float
    """Of the requests that the candidate got from then on."""
    what: str
    figures: dict[str, Any] = {}
    """Of the candidate and the others, where that was decided by them."""


class Rollout(msgspec.Struct, kw_only=True):
    """All of it."""

    version: Literal[1] = 1
    route: str
    candidate: str
    """`model`, or `model@upstream`."""
    url: str
    """Of the admin API."""
    steps: list[float]
    """Shares, from 0 to 1; the last is 1."""
    limits: dict[str, Any]
    before: dict[str, float]
    """Weights of all targets at the beginning: those of an abort."""
    verdict: str
    """What an evaluation said of it, or why there was none."""
    phase: Phase = "running"
    step: int = -1
    """Index of the present share; -1 before the first."""
    since: float = 0.0
    """When the present share was set, by the clock of whoever did it."""
    reference: dict[str, Any] | None = None
    """Figures of the other targets from when they last had enough requests."""
    events: list[Event] = []

    @property
    def share(self) -> float:
        """That the candidate gets now."""
        return self.events[-1].share if self.events else 0.0


class StateFile:
    """One rollout's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Rollout | None:
        """None where there is none. Raises StartupError."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Rollout)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StartupError(
                f"{self.path} cannot be read as the state of a rollout: {error}.",
                advice="Name another file with --state, or move this one away; weights stay as they are.",
            ) from error

    def write(self, rollout: Rollout) -> None:
        """All of it, or nothing. Raises StartupError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        content = msgspec.json.format(msgspec.json.encode(rollout), indent=1) + b"\n"
        writing.write(self.path, content, durable=True)

    @contextlib.contextmanager
    def alone(self, what: str = "change", *, wait: bool = True) -> Iterator[None]:
        """Nobody else is in here. `what`: `change` for a moment, `run` for as long as a rollout is watched.

        Raises StartupError where somebody is, and is not waited for.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(
                self.path.with_name(f".{self.path.name}.{what}"), os.O_RDWR | os.O_CREAT, 0o644
            )
        except OSError as error:
            raise StartupError(f"{self.path.parent} cannot be written: {error.strerror or error}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise StartupError(
                f"Another `penstock rollout start` watches this rollout ({self.path}).",
                advice="`penstock rollout status` shows it; promote and abort are heard by it.",
            ) from None
        try:
            yield
        finally:
            os.close(descriptor)
