"""The engine's process: loads the model, then steps, with its inbox and outbox over ZeroMQ.

    python -m penstock.engine.process '{"config": {…}, "inbox": "ipc://…", "outbox": "ipc://…", …}'

Its clients are the process that has started it, and those API processes that this one names (engine.clients).
It sleeps in poll() while there is no work, and ends when told to drain, when it fails (after saying why), or
when the process that started it is gone: then the pipe `parent` reaches its end.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from penstock.core.errors import PenstockError, StartupError, cause
from penstock.core.plan import Event
from penstock.kernels import start_build
from penstock.observe import logs

from .clients import STARTER, Clients
from .config import EngineConfig
from .heartbeat import Heartbeat
from .messages import Abort, Add, Drain, Failed, FromEngine, Join, Leave, Output, Ready, Settled

if TYPE_CHECKING:  # torch is imported when the sockets are there
    from .build import Engine
    from .loop import EngineLoop

logger = logging.getLogger("penstock.engine")

_MOST_BETWEEN_STEPS = 4096
"""Sequences that are taken in before those who run get their next step; messages that bring more wait."""
_QUIET_MS = 1000
"""Idle time before the scheduler's invariants are checked, in milliseconds."""


class Launch(msgspec.Struct, frozen=True):
    """What the parent process tells its engine."""

    config: EngineConfig
    inbox: str
    outbox: str
    heartbeat: str
    parent: int
    """File descriptor of a pipe whose other end the parent holds."""
    log_level: str = "info"
    log_format: str = "text"


class EngineProcess:
    """Sockets around an EngineLoop."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._clients = Clients(self._context, self._poller, launch.inbox, launch.outbox)
        self._poller.register(launch.parent, zmq.POLLIN)
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller.register(self._woken, zmq.POLLIN)
        self._ready: Ready | None = None
        self._deadline: float | None = None
        self._checked = False
        """Whether the scheduler's invariants were checked since the last step."""
        self._chore: Callable[[], bool] | None = None
        """Work for when there is nothing else to do."""

    def send(self, message: FromEngine) -> None:
        """Queue a message for the process that has started this one."""
        self._clients.send(message)

    def run(self) -> None:
        """Load, then serve until drained. Raises whatever ends the engine."""
        device = self._launch.config.device
        if device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists()):
            start_build()  # on a machine's first start, the CPU kernels are compiled while torch is imported
        gc.disable()  # while what stays is made: a tenth of the time of importing torch
        from .build import build_engine

        logs.adopt()  # torch has given its loggers handlers
        engine = build_engine(self._launch.config, Heartbeat(Path(self._launch.heartbeat)))
        gc.collect()
        gc.freeze()  # what is there now stays: collections need not look at it again
        gc.enable()
        self._ready = Ready(engine.info)
        self.send(self._ready)
        self.send(Output([], engine.loop.stats()))  # from here on, idle time is known
        loop: EngineLoop = engine.loop
        self._chore = engine.chore
        if loop.held is not None:
            loop.held.wake = self._wake
        try:
            while self._deadline is None or loop.has_work:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._publish(loop.handle(Abort(loop.unfinished)), loop)
                    while loop.has_work:  # a step under way owes last events
                        self._publish(loop.step(), loop)
                    break
                events = self._receive(loop, wait=not loop.can_step)
                if events:
                    self._publish(events, loop)
                if loop.can_step:
                    self._publish(loop.step(), loop)
                    self._checked = False
        except Exception as error:
            self._give_up(loop, error)
            self._dump(engine)
            raise
        finally:
            engine.close()

    def _wake(self) -> None:
        """End the sleep in poll(); from any thread."""
        with contextlib.suppress(BlockingIOError):  # full of such bytes: it will wake up
            os.write(self._waker, b"1")

    def close(self) -> None:
        """Send what is queued (for at most a second) and free the sockets."""
        self._context.destroy(linger=1000)

    def _give_up(self, loop: EngineLoop, error: Exception) -> None:
        """Nobody gets an answer any more, but what was computed for them has its bills."""
        try:
            self._publish(loop.give_up(f"the engine died: {cause(error)}"), loop)
        except Exception as another:
            logger.error("the last bills are lost: %s", another)

    def _publish(self, events: list[Event], loop: EngineLoop) -> None:
        self._clients.publish(events, loop.stats())

    def _receive(self, loop: EngineLoop, wait: bool) -> list[Event]:
        """Take in what has arrived, up to a bound; when there is nothing to do, sleep until something has."""
        events: list[Event] = []
        taken = 0
        ready = self._poller.poll(_QUIET_MS if wait and not self._checked else 0)
        if wait and not ready:
            if not self._checked:  # quiet for a while: checking costs nobody anything now
                loop.scheduler.check()
                self._checked = True
            ready = self._until_called()
        if any(source == self._launch.parent for source, _ in ready):
            raise SystemExit("the API process is gone")
        if any(source == self._woken for source, _ in ready):
            os.read(self._woken, 4096)
            events += loop.admit_held()
        for client, message in self._clients.received():
            if isinstance(message, Add):
                taken += message.sequences
                if self._clients.brings(client, message.spec):
                    events += loop.handle(message)
            elif isinstance(message, Abort):
                taken += message.sequences
                if ids := self._clients.own(client, message.ids):
                    events += loop.handle(Abort(ids))
            elif isinstance(message, Settled):
                self._clients.settled(client, message.ids)
            elif client == STARTER:
                events += self._obey(message, loop)
            if taken >= _MOST_BETWEEN_STEPS:
                break
        return events

    def _until_called(self) -> list[tuple[object, int]]:
        """Sleep until something arrives; before that, do what nobody waits for, a piece at a time: whoever
        comes waits for one piece at most."""
        while self._chore is not None:
            if ready := self._poller.poll(0):
                return ready
            if not self._chore():
                self._chore = None
        return self._poller.poll()

    def _obey(self, message: Join | Leave | Drain, loop: EngineLoop) -> list[Event]:
        """What only the process that has started this one may say."""
        if isinstance(message, Drain):
            self._deadline = time.monotonic() + message.timeout
        elif isinstance(message, Join):
            greeting = [self._ready] if self._ready is not None else []
            self._clients.join(message, *greeting, Output([], loop.stats()))
        elif running := self._clients.leave(message.client):
            return loop.handle(Abort(running))
        return []

    def _dump(self, engine: Engine) -> None:
        """Keep the last steps: they show what led to the crash."""
        try:
            descriptor, name = tempfile.mkstemp(prefix="penstock-crash-", suffix=".jsonl")
            os.close(descriptor)
            engine.log.dump(Path(name))
            logger.error("the last steps are in %s", name)
        except Exception as error:
            logger.error("could not write the last steps: %s", error)


def main(argument: str) -> int:
    """Run an engine; returns the exit status. The reason of a failure has been sent by then."""
    launch = msgspec.json.decode(argument, type=Launch)
    logs.configure("engine", level=launch.log_level, format=launch.log_format)
    # the terminal sends these to the whole group; the API process decides when the engine ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process = EngineProcess(launch)
    try:
        process.run()
    except SystemExit as reason:
        logger.info("engine ends: %s", reason)
        shutil.rmtree(Path(launch.heartbeat).parent, ignore_errors=True)  # nobody else is left to do it
        return 0
    except StartupError as error:
        process.send(Failed(type(error).__name__, error.message, advice=error.advice, param=error.param))
        return 2
    except BaseException as error:
        trace = traceback.format_exc()
        name = type(error).__name__ if isinstance(error, PenstockError) else "EngineDead"
        process.send(Failed(name, cause(error), trace=trace))
        return 1
    finally:
        process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
