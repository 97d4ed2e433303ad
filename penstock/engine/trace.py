"""The step log: what came in, what was planned and what came back, one JSON object per line.

    {"config": {…}, "capacity": {…}}                                      first line
    {"now": s, "in": {"type": "Add", "spec": {…}} | {"type": "Abort", …}} whatever arrived
    {"now": s, "plan": {…}}                                               a step was planned and submitted
    {"now": s, "step": n, "seconds": s, "tokens": [[…], …], …}            and committed, one list per item
    {"now": s, "reset": [step, epoch]}                                    or lost, with all requests
    {"end": n}                                                            last line: all n entries are there

A record without its last line is incomplete: the disk was full, or the engine was killed.

It is the replay format (`engine.replay`). A file that cannot be written any more is told of at once and once
more at the end; serving goes on without it. The last entries are also kept in a ring, which is written out
when the engine crashes; it holds as many as fit into a bound on the token ids of their requests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import msgspec

from penstock.core.errors import StartupError
from penstock.core.executor import Capacity
from penstock.core.plan import Plan, StepResult
from penstock.core.scheduler import SchedulerConfig

from .messages import Abort, Add

logger = logging.getLogger("penstock.engine")

_RING_ENTRIES = 512
_LOOK_EVERY = 512
"""Entries after which it is looked whether the file still has a name."""
_LAST_LINE = 64
"""Bytes that hold the last line of a record."""
_RING_TOKENS = 1 << 19
"""Most token ids of requests in the ring: 20 MB, where 256 prompts of 32k tokens would be 300."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line to be, and how many token ids it keeps alive."""

    kind: str
    now: float
    content: Any
    tokens: int = 0

    def line(self) -> str:
        if self.kind == "step":
            record = {"now": self.now, **self.content}
        elif self.kind == "plan":
            record = {"now": self.now, "plan": self.content.record()}
        else:
            record = {"now": self.now, "in": msgspec.to_builtins(self.content, str_keys=True)}
        return json.dumps(record, separators=(",", ":")) + "\n"


class StepLog:
    """Keeps the last steps in memory, and writes all of them to a file if there is one.

    Args:
        file: from `open_log`, which finds out early whether it can be written.
    """

    def __init__(self, config: SchedulerConfig, capacity: Capacity, file: TextIO | None = None) -> None:
        head = {"config": asdict(config), "capacity": msgspec.to_builtins(capacity, order="deterministic")}
        self._head = json.dumps(head, separators=(",", ":"))
        self._ring: deque[_Entry] = deque()
        self._tokens = self._dropped = 0
        self._file = file
        self._written = 0
        """Entries."""
        self._failure = ""
        """Why the file ends early, and where."""
        self._write(self._head + "\n")

    def arrived(self, now: float, message: Add | Abort) -> None:
        """Something came in before the next step."""
        tokens = 0
        if isinstance(message, Add):
            tokens = sum(len(prompt.token_ids) for prompt in message.spec.prompts)
            if (sampling := message.spec.sampling) is not None:
                named = (sampling.logit_bias, sampling.stop_token_ids, sampling.allowed_token_ids or ())
                tokens += sum(map(len, named))
        self._keep(_Entry("in", now, message, tokens))

    def planned(self, now: float, plan: Plan) -> None:
        """A step was planned."""
        tokens = 0
        if plan.admitted:
            tokens = sum(len(admission.generated) for admission in plan.admitted)
            plan = replace(plan, admitted=tuple(each.without_prompts() for each in plan.admitted))
        self._keep(_Entry("plan", now, plan, tokens))

    def stepped(self, now: float, plan: Plan, result: StepResult) -> None:
        """A step was committed."""
        # not the result itself: the logprobs of a long prompt are large, and no part of the log
        content: dict[str, Any] = {
            "step": plan.step,
            "seconds": result.seconds,
            "tokens": [outcome.tokens for outcome in result.outcomes],
        }
        if not result.regular:
            content["regular"] = False
        pooled = [place for place, outcome in enumerate(result.outcomes) if outcome.pooled is not None]
        if pooled:
            content["pooled"] = pooled
        failures = {
            place: {"cause": outcome.failure.cause, "tainted": outcome.failure.tainted}
            for place, outcome in enumerate(result.outcomes)
            if outcome.failure is not None
        }
        if failures:
            content["failures"] = failures
        self._keep(_Entry("step", now, content))

    def reset(self, now: float, numbers: tuple[int, int]) -> None:
        """The engine has forgotten all requests; its scheduler goes on with these numbers."""
        self._keep(_Entry("step", now, {"reset": numbers}))

    def dump(self, path: Path) -> None:
        """Write the ring to a file: after a crash, these are the last steps."""
        with path.open("w", encoding="utf-8") as file:
            file.write(self._head + "\n")
            if self._dropped:
                file.write(json.dumps({"dropped": self._dropped}) + "\n")
            file.writelines(entry.line() for entry in self._ring)

    def close(self) -> None:
        """Flush and close the file; an incomplete one is named in the log's last word of it."""
        if self._file:
            try:
                self._file.write(json.dumps({"end": self._written}, separators=(",", ":")) + "\n")
                self._look(self._file)
                self._file.close()
            except OSError as error:
                self._stop(error)
            self._file = None
        if self._failure:
            logger.error("%s: the record is incomplete", self._failure)
            self._failure = ""

    def _keep(self, entry: _Entry) -> None:
        self._ring.append(entry)
        self._tokens += entry.tokens
        while len(self._ring) > _RING_ENTRIES or self._tokens > _RING_TOKENS:
            self._tokens -= self._ring.popleft().tokens
            self._dropped += 1
        if self._file:
            self._write(entry.line())
            self._written += 1
            if self._file and self._written % _LOOK_EVERY == 0:
                try:
                    self._look(self._file)
                except OSError as error:
                    self._stop(error)

    def _write(self, line: str) -> None:
        """A log that cannot be written must not end the engine."""
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            self._stop(error)

    @staticmethod
    def _look(file: TextIO) -> None:
        """Raises FileNotFoundError if the file has been deleted: writing it only fills the disk."""
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and not status.st_nlink:
            raise FileNotFoundError("the file has been deleted")

    def _stop(self, error: OSError) -> None:
        """The engine goes on without the file; what is in it may be cut off anywhere."""
        if self._file is None:
            return
        reason = error.strerror or str(error)
        self._failure = f"--record-steps {self._file.name}: {reason} after {self._written} entries"
        logger.error("%s; recording stops here, serving goes on", self._failure)
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = None


def open_log(path: str | None) -> TextIO | None:
    """The file of --record-steps. Raises StartupError, naming the flag, when it cannot be written."""
    if path is None:
        return None
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise StartupError(
            f"--record-steps {path}: {error.strerror}.",
            param="--record-steps",
            advice="Name a writable file.",
        ) from error


def ends_well(path: Path) -> bool:
    """Whether a step log has its last line. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_LINE))
        *_, last = file.read().split(b"\n{")
    return last.startswith(b'"end":') and last.endswith(b"}\n")


def read_log(lines: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(head, records) of a step log; a last line that was cut off by the end of its process is left out.

    Raises ValueError if it is none, if it begins in mid-run, or if entries are missing.
    """
    entries: list[dict[str, Any]] = []
    broken = False
    for line in lines:
        if broken:
            raise ValueError("a line in the middle is not JSON")
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            broken = True
    if not entries or not isinstance(entries[0], dict) or not {"config", "capacity"} <= entries[0].keys():
        raise ValueError("the first line is not the head of a step log")
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("a line is not a JSON object")
    if len(entries) > 1 and "dropped" in entries[1]:
        raise ValueError(
            f"it begins in mid-run, {entries[1]['dropped']} entries are missing (a crash leaves the last "
            "steps only; they can be read, but not replayed)"
        )
    if "end" in entries[-1] and (count := entries.pop()["end"]) != len(entries) - 1:
        raise ValueError(f"{len(entries) - 1} entries are left of {count}")
    return entries[0], entries[1:]
