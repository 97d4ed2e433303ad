"""Who talks to the engine: the process that has started it (the starter, 0), and the API processes it names.

    starter ── Join(1) Join(2) ──▶ ┌ 0: inbox, outbox ┐
    API 1 ── Add("a") ───────────▶ │ 1: inbox, outbox │ ── events of "a" ──▶ API 1
    API 2 ── Abort("a") ─────────▶ └ 2: inbox, outbox ┘    (nothing: it is not its)

An event goes to whoever has brought its request, and an abort reaches its sender's requests only. What a
client has not counted when it leaves goes to the starter as Lost: for that its sequences are remembered
until it says that they are settled. The starter's own are not: it takes the engine with it when it dies.
Statistics go to the starter with every step, to others with their events.

It knows sockets and messages; it knows neither the loop nor the scheduler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import zmq

from penstock.core.errors import InvalidRequest
from penstock.core.plan import Event, Failure
from penstock.core.request_spec import FinishReason, RequestSpec
from penstock.core.stats import EngineStats

from .messages import (
    FromEngine,
    Join,
    Lost,
    LostSequence,
    Output,
    ToEngine,
    decode_to_engine,
    encode,
)

STARTER = 0


@dataclass(slots=True)
class _Sequence:
    """Of a client other than the starter."""

    client: int
    prompt_tokens: int
    max_tokens: int
    arrived_at: float
    generated: int = 0
    last: Event | None = None
    """Sent, and not settled yet; without tokens."""

    def lost(self, last: Event) -> LostSequence:
        """Nobody has counted it."""
        return LostSequence(last, self.prompt_tokens, self.generated, self.max_tokens, self.arrived_at)


class Clients:
    """The engine's ends of all connections.

    Args:
        inbox, outbox: the starter's addresses, which it binds.
        poller: hears of what arrives, and of nothing of clients that have left.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller, inbox: str, outbox: str):
        self._context = context
        self._poller = poller
        self._ends: dict[int, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = {}
        self._sequences: dict[str, _Sequence] = {}
        self.join(Join(STARTER, inbox, outbox))

    # ------------------------------------------------------------------ who is there

    def join(self, join: Join, *greeting: FromEngine) -> None:
        """A new client; it gets these messages first."""
        inbox, outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        outbox.set_hwm(0)  # a slow API process must not stop the engine
        inbox.connect(join.inbox)
        outbox.connect(join.outbox)
        self._poller.register(inbox, zmq.POLLIN)
        self._ends[join.client] = inbox, outbox
        for message in greeting:
            outbox.send(encode(message))

    def leave(self, client: int) -> tuple[str, ...]:
        """A client has gone. Returns its sequences that are not finished: they are to be aborted."""
        for end in self._ends.pop(client, ()):
            with contextlib.suppress(KeyError):  # only one of them is registered
                self._poller.unregister(end)
            end.close(linger=0)  # what waits for it is nobody's
        running: list[str] = []
        lost: list[LostSequence] = []
        for id, sequence in list(self._sequences.items()):
            if sequence.client != client:
                continue
            if sequence.last is None:
                running.append(id)
            else:
                lost.append(sequence.lost(sequence.last))
                del self._sequences[id]
        self._tell_lost(lost)
        return tuple(running)

    # ------------------------------------------------------------------ in

    def received(self) -> Iterator[tuple[int, ToEngine]]:
        """(client, message) of all that has arrived, one of each client by turns."""
        waiting = list(self._ends)
        while waiting:
            for client in list(waiting):
                if client not in self._ends:  # it has left meanwhile
                    waiting.remove(client)
                    continue
                try:
                    message = self._ends[client][0].recv(zmq.NOBLOCK)
                except zmq.Again:
                    waiting.remove(client)
                    continue
                yield client, decode_to_engine(message)

    def brings(self, client: int, spec: RequestSpec) -> bool:
        """A client brings a request: its events will be the client's. False, and the client is told, where
        another client has one of its ids."""
        if client == STARTER and not self._sequences:
            return True
        ids = spec.ids
        taken = [id for id in ids if (other := self._sequences.get(id)) and other.client != client]
        if taken:
            failure = Failure(f"request id {taken[0]!r} is already in use.", InvalidRequest.__name__)
            self._ends[client][1].send(
                encode(Output([Event(id, finish=FinishReason.ERROR, failure=failure) for id in ids]))
            )
            return False
        if client != STARTER:
            for index, id in enumerate(ids):
                prompt = spec.prompt_of(index)
                self._sequences[id] = _Sequence(
                    client, len(prompt.token_ids), prompt.max_tokens, spec.arrived_at
                )
        return True

    def own(self, client: int, ids: Sequence[str]) -> tuple[str, ...]:
        """Those of the sequences that are this client's."""
        if not self._sequences:
            return tuple(ids)
        own = (self._sequences[id].client if id in self._sequences else STARTER for id in ids)
        return tuple(id for id, whose in zip(ids, own, strict=True) if whose == client)

    def settled(self, client: int, ids: Sequence[str]) -> None:
        """A client has counted these."""
        for id in self.own(client, ids):
            if (sequence := self._sequences.get(id)) is not None and sequence.last is not None:
                del self._sequences[id]

    # ------------------------------------------------------------------ out

    def send(self, message: FromEngine) -> None:
        """To the starter."""
        self._ends[STARTER][1].send(encode(message))

    def publish(self, events: list[Event], stats: EngineStats) -> None:
        """Each event to whom it belongs."""
        if not self._sequences:
            self.send(Output(events, stats))
            return
        batches: dict[int, list[Event]] = {STARTER: []}
        lost: list[LostSequence] = []
        for event in events:
            sequence = self._sequences.get(event.request)
            if sequence is None:
                batches[STARTER].append(event)
                continue
            sequence.generated += len(event.tokens)
            last = None if event.finish is None else _figures(event)
            if sequence.client in self._ends:
                batches.setdefault(sequence.client, []).append(event)
                sequence.last = last
            elif last is not None:
                lost.append(sequence.lost(last))
                del self._sequences[event.request]
        for client, batch in batches.items():
            self._ends[client][1].send(encode(Output(batch, stats)))
        self._tell_lost(lost)

    def _tell_lost(self, lost: list[LostSequence]) -> None:
        if lost:
            self.send(Lost(lost))


def _figures(event: Event) -> Event:
    """Without what a long answer holds."""
    return event._replace(tokens=(), logprobs=(), prompt_logprobs=None, pooled=None)
