"""All engines of this machine: implements the Fleet that the door asks.

    fleet = LocalFleet(parts, key=…)      nothing runs yet; ports are taken
    fleet.start()                         eager models
    async with fleet.use(model) …         see gateway/fleet.py
    await fleet.close()                   when it returns, no process is left

It decides when a model starts and when it sleeps; each replica's supervisor does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp

from penstock.core.errors import StartupError
from penstock.gateway.fleet import ModelStarting, Replica
from penstock.spec.model import Model

from .command import Command, with_flags
from .supervisor import Port, Supervisor, Timing

logger = logging.getLogger("penstock.up")

_PROGRESS = 10.0
"""Seconds between two lines of the log about requests that wait."""
_UNKNOWN_START = 10
"""Retry-After in seconds where no start has told how long one takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A model with the commands of its replicas, each for a port that it is given."""

    model: Model
    hardware: str
    """Kind of device of its pool."""
    commands: Sequence[Callable[[int], Command]]
    """port → command, for each replica."""


class LocalFleet:
    """Implements Fleet. Made and used on one event loop."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        *,
        key: str,
        show: Callable[[str], None],
        environment: Mapping[str, str],
        timing: Timing | None = None,
    ) -> None:
        self.key = key
        self._refusal: StartupError | None = None
        self._watchers: list[Callable[[Replica], None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._ports: list[Port] = []
        self._parts = parts
        self._commands: dict[tuple[str, int], Command] = {}
        """As the spec has them."""
        self._models = {
            name: _Model(name, part, self._supervisors(name, part, show, environment, timing))
            for name, part in parts.items()
        }

    # ------------------------------------------------------------------ Fleet

    def models(self) -> Sequence[str]:
        """See Fleet.models."""
        return tuple(self._models)

    def replicas(self, model: str) -> Sequence[Replica]:
        """See Fleet.replicas."""
        found = self._models.get(model)
        return () if found is None else found.replicas

    async def ready(self, model: str, *, timeout: float, max_waiting: int | None = None) -> None:
        """See Fleet.ready."""
        await self._models[model].ready(timeout, max_waiting)

    def use(self, model: str) -> contextlib.AbstractContextManager[None]:
        """See Fleet.use."""
        return self._models[model].use()

    def subscribe(self, callback: Callable[[Replica], None]) -> None:
        """See Fleet.subscribe."""
        self._watchers.append(callback)

    # ------------------------------------------------------------------ for `up`

    def start(self) -> None:
        """Start the models that do not wait for a request."""
        for model in self._models.values():
            if model.eager:
                model.wake()

    @property
    def refusal(self) -> StartupError | None:
        """Why an eager model cannot work as it is configured, if one has never run and said so."""
        return self._refusal

    async def close(self, *, patient: bool = True) -> None:
        """End all engines at the same time; return when they are gone. Without patience, they are killed."""
        await asyncio.gather(*(model.close(patient) for model in self._models.values()))
        if self._session is not None:
            await self._session.close()
        for port in self._ports:
            port.close()

    # ------------------------------------------------------------------ for `tune`

    def spec(self, model: str) -> Model:
        """What the spec says of a model."""
        return self._parts[model].model

    def arguments(self, model: str, index: int) -> Sequence[str]:
        """The command line of a replica, as the spec has it."""
        return self._commands[model, index].arguments

    async def start_replica(self, model: str, index: int, *, timeout: float) -> None:
        """Return once this replica takes requests. Raises StartupError as `restart` does."""
        one = self._models[model].supervisors[index]
        if one.replica.state != "ready":
            one.refused = False
            await self._started(one, one.wake, timeout)

    async def restart(self, model: str, index: int, flags: Mapping[str, int], *, timeout: float) -> None:
        """Have a replica started again with these flags after its own; return once it takes requests.

        Raises StartupError if it ends instead, or takes longer: it goes on being tried then, as any replica.
        """
        one = self._models[model].supervisors[index]
        command = with_flags(self._commands[model, index], flags)
        await self._started(one, lambda: one.restart(command), timeout)

    # ------------------------------------------------------------------ inside

    async def _started(self, one: Supervisor, begin: Callable[[], None], timeout: float) -> None:
        """Begin, and wait for what becomes of the start. Raises StartupError."""
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        starts = one.replica.state == "starting"

        def watch(replica: Replica) -> None:
            nonlocal starts
            if replica.name != one.replica.name or over.done():
                return
            starts = starts or replica.state == "starting"
            if starts and replica.state in ("ready", "waiting", "asleep"):
                over.set_result("" if replica.state == "ready" else replica.why or "it was put to sleep")

        self._watchers.append(watch)
        try:
            begin()
            why = await asyncio.wait_for(over, timeout)
        except TimeoutError:
            why = f"it is not ready after {timeout:g} s"
        finally:
            self._watchers.remove(watch)
        if why:
            raise StartupError(f"{one.replica.name} does not start: {why}")

    def _supervisors(
        self,
        name: str,
        part: Part,
        show: Callable[[str], None],
        environment: Mapping[str, str],
        timing: Timing | None,
    ) -> list[Supervisor]:
        made = []
        for index, command in enumerate(part.commands):
            port = Port()
            self._ports.append(port)
            replica = Replica(
                model=name,
                index=index,
                url=f"http://127.0.0.1:{port.number}",
                state="asleep",
                since=asyncio.get_running_loop().time(),
                device=part.hardware,
                devices=part.model.devices,
            )
            self._commands[name, index] = command(port.number)
            made.append(
                Supervisor(
                    replica,
                    self._commands[name, index],
                    session=self._client,
                    on_change=self._changed,
                    show=show,
                    wanted=lambda: self._models[name].wanted,
                    timing=timing,
                    environment=environment,
                )
            )
        return made

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    def _changed(self, replica: Replica) -> None:
        model = self._models[replica.model]
        one = model.supervisors[replica.index]
        if one.refused and one.start_seconds is None and model.eager and self._refusal is None:
            self._refusal = StartupError(f"{replica.name} cannot be served: {replica.why}")
        model.changed()
        for watcher in self._watchers:
            watcher(replica)


class _Model:
    """Replicas of one model, who uses them, and who waits for them."""

    def __init__(self, name: str, part: Part, supervisors: Sequence[Supervisor]) -> None:
        self.supervisors = supervisors
        self.eager = part.model.start == "eager"
        self.replicas: tuple[Replica, ...] = tuple(each.replica for each in supervisors)
        self._name = name
        self._keep_alive = part.model.keep_alive
        self._users = 0
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._progress: asyncio.Task[None] | None = None
        self._closed = False

    def wake(self) -> None:
        for each in self.supervisors:
            each.wake()

    def changed(self) -> None:
        self.replicas = tuple(each.replica for each in self.supervisors)
        if self._is_ready:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            if not self._users:
                self._watch_idleness()
        elif self._closed or all(each.refused for each in self.supervisors):
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(self._unavailable())

    async def ready(self, timeout: float, max_waiting: int | None) -> None:
        if self._is_ready:
            return
        if self._closed:
            raise self._unavailable()
        if max_waiting is not None and len(self._waiters) >= max_waiting:
            raise ModelStarting(
                f"The model {self._name} is starting, and {len(self._waiters)} requests wait for it already.",
                retry_after=self._remaining(),
            )
        for each in self.supervisors:
            each.refused = False  # who asks again may find it mended
        self.wake()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.add(waiter)
        if self._progress is None:
            self._progress = loop.create_task(self._report())
        try:
            await asyncio.wait_for(waiter, timeout)
        except TimeoutError:
            raise ModelStarting(
                f"The model {self._name} is still starting, after {timeout:g} s.",
                advice="Try again later.",
                retry_after=self._remaining(),
            ) from None
        finally:
            self._waiters.discard(waiter)
            if not self._waiters and self._progress is not None:
                self._progress.cancel()
                self._progress = None

    @contextmanager
    def use(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users and self._keep_alive is not None:
                self._idle_since = asyncio.get_running_loop().time()
                self._watch_idleness()

    async def close(self, patient: bool) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.changed()
        await asyncio.gather(*(each.close(patient=patient) for each in self.supervisors))

    @property
    def wanted(self) -> bool:
        """Whether it is to be in memory: one that leaves it when nobody wants it need not come back then."""
        return self._keep_alive is None or self._users > 0 or bool(self._waiters)

    @property
    def _is_ready(self) -> bool:
        return any(replica.state == "ready" for replica in self.replicas)

    def _unavailable(self) -> ModelStarting:
        # what the engine said is for whoever runs it: in the log
        return ModelStarting(
            f"The model {self._name} cannot be started.", advice="The gateway's log says why.", retry_after=60
        )

    def _remaining(self) -> int:
        """Seconds that a start may still take, from the last one."""
        known = [each.start_seconds for each in self.supervisors if each.start_seconds is not None]
        if not known:
            return _UNKNOWN_START
        now = asyncio.get_running_loop().time()
        since = min(replica.since for replica in self.replicas)
        return max(1, math.ceil(min(known) - (now - since)))

    def _watch_idleness(self) -> None:
        """See to it that the model sleeps once nobody has used it for `keep_alive` seconds."""
        if self._keep_alive is not None and self._timer is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._idle_since = max(self._idle_since, max(replica.since for replica in self.replicas))
            self._timer = loop.call_at(self._idle_since + self._keep_alive, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._users or not self._is_ready:  # whoever ends last, or gets ready, watches again
            return
        loop = asyncio.get_running_loop()
        assert self._keep_alive is not None
        if loop.time() < self._idle_since + self._keep_alive:
            self._watch_idleness()
            return
        logger.info("%s: no request for %g s; it leaves memory.", self._name, self._keep_alive)
        for each in self.supervisors:
            each.sleep()

    async def _report(self) -> None:
        """Progress, for as long as requests wait."""
        logger.info("%s: a request waits for it to start", self._name)
        began = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(_PROGRESS)
            logger.info(
                "%s: %d requests wait for it, the first for %.0f s; it is %s",
                self._name,
                len(self._waiters),
                asyncio.get_running_loop().time() - began,
                ", ".join(replica.state for replica in self.replicas),
            )
