"""An EngineClient that plays a script: deterministic tokens and figures, and failures on demand.

It runs inside the server's event loop; the knobs and the `wait_…` methods are for the test's thread.

Every token takes one step. Times follow from the arrival: queued for 0.5 s, first token 0.25 s later, then
one every 0.125 s; each token costs 0.001 device seconds.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import EngineDead, PenstockError
from penstock.core.plan import Event, Failure, TokenLogprob
from penstock.core.pooling import Vectors
from penstock.core.request import Request
from penstock.core.request_spec import FinishReason, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.stats import EngineStats
from penstock.engine.client import Liveness
from penstock.engine.messages import ModelInfo

PATIENCE = 20.0
"""Seconds after which a wait in a test counts as a hang."""

INFO = ModelInfo(
    path="/models/tiny",
    architecture="FakeForCausalLM",
    dtype="float32",
    device="fake",
    vocab_size=320,
    max_model_len=256,
    eos_ids=(258,),
    block_size=16,
    num_blocks=64,
    max_num_seqs=32,
    parameters=0,
)


@dataclass(frozen=True)
class Asked:
    """One sequence that was asked for."""

    spec: RequestSpec
    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    params: Sampling
    seed: int | None
    prompt_logprobs: int | None
    leader: str | None

    @classmethod
    def of(cls, spec: RequestSpec) -> list[Asked]:
        return [
            cls(
                spec,
                request.id,
                tuple(request.tokens),
                request.max_tokens,
                spec.sampling or Sampling(),
                spec.seed_of(request.index),
                spec.prompt_logprobs_of(request.index),
                None if request.leader is None else request.leader.id,
            )
            for request in Request.of(spec)
        ]


@dataclass
class Running:
    """One sequence in the engine."""

    add: Asked
    script: list[int]
    position: int = 0
    aborted: bool = False


@dataclass
class FakeEngine:
    """See the module. `reply` gives the tokens of a request; the end-of-sequence token follows them."""

    reply: Callable[[Asked], list[int]]
    info: ModelInfo = INFO
    tokens_per_event: int = 1
    queue_limit: int | None = None
    limit_at_fault: str = "max_num_queued_reqs"
    fail_at: int | None = None
    """Token count at which every request fails."""
    pause_at: int | None = None
    """Token count at which requests wait for `resume`."""
    crash: Exception | None = None
    """Raised by generate: a bug in the client."""
    loaded: bool = True
    stuck: str = ""
    adds: list[Asked] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    """Requests whose iterator was closed early."""
    aborted: list[str] = field(default_factory=list)
    settled_ids: list[str] = field(default_factory=list)
    """Sequences whose figures are counted."""
    draining: bool = False
    closed: bool = False
    failure: PenstockError | None = None

    def __post_init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._callbacks: list[Callable[[EngineStats], None]] = []
        self._changed = threading.Condition()
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- the protocol ----
    async def generate(
        self, spec: RequestSpec, on_orphan: Callable[[Event], None] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        self._loop = asyncio.get_running_loop()
        if self._wake is None:
            self._wake = asyncio.Event()
        if self.crash is not None:
            raise self.crash
        adds = Asked.of(spec)
        mine = {add.id: Running(add, [*self.reply(add), *self.info.eos_ids[:1]]) for add in adds}
        with self._changed:
            self.adds += adds
            self._running |= mine
            self._changed.notify_all()
        try:
            if self.queue_limit is not None and len(self._running) > self.queue_limit:
                refused = [self._refused(running) for running in mine.values()]
                mine.clear()
                yield refused
            while mine:
                while self._paused(mine.values()) and self.failure is None:
                    self._wake.clear()
                    await self._wake.wait()
                if self.failure is not None:
                    raise EngineDead(str(self.failure))
                events = [self._step(running) for running in mine.values()]
                for event in events:
                    if event.finish is not None:
                        del mine[event.request]
                        self._running.pop(event.request, None)
                yield events
                await asyncio.sleep(0)
        finally:
            with self._changed:
                for id in [add.id for add in adds]:
                    self._running.pop(id, None)
                self.gone += mine
                self._changed.notify_all()
            self._wake.set()
            for running in mine.values():
                running.aborted = True
                if on_orphan is not None and self.failure is None:
                    on_orphan(self._step(running))

    def abort(self, ids: Sequence[str]) -> None:
        with self._changed:
            self.aborted += ids
            for id in ids:
                if id in self._running:
                    self._running[id].aborted = True
            self._changed.notify_all()
        if self._wake is not None:
            self._wake.set()

    def settled(self, id: str) -> None:
        self.settled_ids.append(id)

    def liveness(self) -> Liveness:
        return Liveness(alive=not self.stuck, reason=self.stuck)

    @property
    def ready(self) -> bool:
        return self.loaded and not self.draining and self.failure is None

    @property
    def load(self) -> int:
        return len(self._running)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(running=self.load)

    def on_stats(self, callback: Callable[[EngineStats], None]) -> None:
        self._callbacks.append(callback)

    async def drain(self, timeout: float) -> None:
        self.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self._running and loop.time() < deadline:
            await asyncio.sleep(0.01)
        self.abort(list(self._running))
        while self._running:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.closed = True

    def pool(self, add: Asked) -> Vectors:
        """(length, 1) of a prompt, (id, 1) of each token; of labels, length / 100 and 1."""
        pooling = add.spec.pooling
        assert pooling is not None
        if pooling.type == "all":
            return Vectors.of(*((float(id), 1.0) for id in add.prompt))
        if pooling.task == "classify":
            labels = self.info.pooling.labels if self.info.pooling is not None else ()
            return Vectors.of((len(add.prompt) / 100, *(1.0 for _ in labels[1:])))
        return Vectors.of((float(len(add.prompt)), 1.0))

    # ---- the knobs ----
    def reset(self, reply: Callable[[Asked], list[int]]) -> None:
        """Back to the beginning, for the next test."""
        self.reply = reply
        self.tokens_per_event = 1
        self.limit_at_fault = "max_num_queued_reqs"
        self.queue_limit = self.fail_at = self.pause_at = self.crash = self.failure = None
        self.loaded, self.stuck, self.draining = True, "", False
        self.adds, self.gone, self.aborted = [], [], []

    def resume(self) -> None:
        """Let paused requests go on."""
        self.pause_at = None
        self._poke()

    def die(self, cause: str) -> None:
        """The engine process ends."""
        self.failure = EngineDead(cause)
        self._poke()

    def publish(self, stats: EngineStats) -> None:
        """Report a step."""
        for callback in self._callbacks:
            callback(stats)

    def wait_until(self, condition: Callable[[FakeEngine], bool]) -> None:
        """Block the test's thread until something in the engine is as wanted."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), PATIENCE):
                raise AssertionError("the engine did not get there")

    def _poke(self) -> None:
        if self._loop is not None and self._wake is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def _paused(self, mine: Collection[Running]) -> bool:
        pause = self.pause_at
        if pause is None or any(running.aborted for running in mine):
            return False
        return any(running.position >= pause for running in mine)

    def _refused(self, running: Running) -> Event:
        self._running.pop(running.add.id, None)
        return Event(
            request=running.add.id,
            finish=FinishReason.ERROR,
            failure=Failure("the queue is full.", "QueueFull", param=self.limit_at_fault, retry_after=3),
            at=running.add.spec.arrived_at,
        )

    def _step(self, running: Running) -> Event:
        add, before = running.add, running.position
        if add.spec.pooling is not None and not running.aborted:
            return Event(
                add.id,
                pooled=self.pool(add),
                finish=FinishReason.STOP,
                at=add.spec.arrived_at + 0.75,
                scheduled_at=add.spec.arrived_at + 0.5,
                device_seconds=0.001,
            )
        finish, stop_reason = None, None
        tokens: list[int] = []
        if running.aborted:
            finish = FinishReason.ABORT
        elif self.fail_at is not None and before >= self.fail_at:
            finish = FinishReason.ERROR
        else:
            while len(tokens) < self.tokens_per_event and finish is None:
                token = running.script[running.position % len(running.script)]
                tokens.append(token)
                running.position += 1
                if running.position < add.params.min_tokens:
                    pass
                elif token in self.info.eos_ids and not add.params.ignore_eos:
                    finish = FinishReason.STOP
                elif token in add.params.stop_token_ids:
                    finish, stop_reason = FinishReason.STOP, token
                elsewhere = len(add.spec.prompts[0].generated)
                if finish is None and elsewhere + running.position >= add.max_tokens:
                    finish = FinishReason.LENGTH
        count, prompt, arrived_at = add.params.logprobs, add.prompt_logprobs, add.spec.arrived_at
        return Event(
            request=add.id,
            tokens=tuple(tokens),
            logprobs=()
            if count is None
            else tuple(logprob(token, count, add.params.logprob_token_ids) for token in tokens),
            prompt_logprobs=None
            if prompt is None or before
            else tuple(logprob(token, prompt) for token in add.prompt[1:]),
            finish=finish,
            stop_reason=stop_reason,
            failure=Failure("device says no") if finish is FinishReason.ERROR else None,
            at=arrived_at + 0.75 + 0.125 * max(running.position - 1, 0),
            scheduled_at=arrived_at + 0.5,
            cached=min(16, len(add.prompt)) if add.spec.cache_salt != "cold" else 0,
            device_seconds=0.001 * running.position,
        )


def logprob(token: int, count: int, named: Sequence[int] | None = None) -> TokenLogprob:
    """The token itself is the second most probable one; its neighbours are the others. The logprob of a named
    token is a hundredth of its id."""
    if named:
        others = [(other, -other / 100) for other in named if other != token]
        return TokenLogprob(token=token, logprob=-0.5, rank=2, top=((token, -0.5), *others))
    top = [(token + 1, -0.25), (token, -0.5), *((token + i, -1.0 * i) for i in range(2, 30))]
    return TokenLogprob(token=token, logprob=-0.5, rank=2, top=tuple(top[:count]))
