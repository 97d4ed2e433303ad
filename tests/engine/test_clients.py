"""Several API processes in front of one engine: an event reaches only its own, and no bill is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.core.stats import EngineStats
from penstock.engine.clients import STARTER, Clients
from penstock.engine.connection import addresses
from penstock.engine.messages import (
    Abort,
    Add,
    Join,
    Lost,
    LostSequence,
    Output,
    decode_from_engine,
    encode,
)
from tests.engine.fake import spec

PATIENCE_MS = 10_000


class End:
    """A client's ends of its sockets."""

    def __init__(self, context: Any, directory: Path, client: int) -> None:
        requests, events = addresses(directory, client)
        self.join = Join(client, requests, events)
        self.outbox, self.inbox = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self.outbox.bind(requests)
        self.inbox.bind(events)

    def read(self, count: int) -> list[Any]:
        """The next messages."""
        messages = []
        for _ in range(count):
            assert self.inbox.poll(PATIENCE_MS), "a message is missing"
            messages.append(decode_from_engine(self.inbox.recv()))
        return messages

    def events(self) -> list[Event]:
        """Of one message."""
        (message,) = self.read(1)
        assert isinstance(message, Output)
        return message.events

    def close(self) -> None:
        """It has died."""
        self.outbox.close(linger=0)
        self.inbox.close(linger=0)

    @property
    def quiet(self) -> bool:
        """Whether nothing is there that has been sent before something that was read elsewhere."""
        return not self.inbox.poll(50)


class House:
    """A starter, two API processes, and the engine's side."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.context = zmq.Context()
        self.poller = zmq.Poller()
        self.starter = End(self.context, directory, STARTER)
        self.clients = Clients(self.context, self.poller, self.starter.join.inbox, self.starter.join.outbox)
        self.ends: dict[int, End] = {}
        for client in (1, 2):
            self.add(client)

    def add(self, client: int) -> End:
        end = self.ends[client] = End(self.context, self.directory, client)
        self.clients.join(end.join, Output([]))
        assert end.events() == []
        return end

    def publish(self, *events: Event) -> None:
        self.clients.publish(list(events), EngineStats())

    def lost(self) -> list[LostSequence]:
        """What the starter is told next, beside steps without events."""
        while True:
            (message,) = self.starter.read(1)
            if isinstance(message, Lost):
                return message.sequences
            assert message.events == []


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.context.destroy(linger=0)


def test_events_go_to_whoever_brought_the_request(house: House) -> None:
    assert house.clients.brings(1, spec("a"))
    assert house.clients.brings(2, spec("b", n=2))
    house.publish(Event("b:1", (1,)), Event("a", (2,)), Event("b:0", (3,)))
    assert [event.request for event in house.ends[1].events()] == ["a"]
    assert [event.request for event in house.ends[2].events()] == ["b:1", "b:0"]
    assert house.starter.events() == []
    house.publish(Event("a", (4,)))
    assert [event.tokens for event in house.ends[1].events()] == [(4,)]
    assert house.ends[2].quiet, "not even the statistics of a step in which it has no part"


def test_the_starter_is_refused_an_id_as_well(house: House) -> None:
    assert house.clients.brings(STARTER, spec("same")), "nobody else has any"
    assert house.clients.brings(1, spec("taken"))
    assert not house.clients.brings(STARTER, spec("taken"))
    (refused,) = house.starter.events()
    assert refused.finish is FinishReason.ERROR


def test_nobody_who_reads_slowly_stops_the_engine(house: House) -> None:
    assert {outbox.get_hwm() for _, outbox in house.clients._ends.values()} == {0}


def test_who_leaves_while_messages_are_handled_is_not_asked_for_more(house: House) -> None:
    for client, end in house.ends.items():
        for name in ("a", "b"):
            end.outbox.send(encode(Add(spec(f"{name}{client}"))))
    while len(dict(house.poller.poll(PATIENCE_MS))) < 2:
        pass
    heard = []
    for _, message in house.clients.received():
        assert isinstance(message, Add)
        heard.append(message.spec.id)
        if heard == ["a1"]:
            house.clients.leave(2)
    assert heard == ["a1", "b1"]


def test_an_id_that_another_has_is_refused_and_nobody_else_hears_of_it(house: House) -> None:
    assert house.clients.brings(1, spec("same"))
    assert not house.clients.brings(2, spec("same"))
    (refused,) = house.ends[2].events()
    assert refused.finish is FinishReason.ERROR
    assert refused.failure is not None
    assert "'same' is already in use" in refused.failure.cause
    assert house.clients.own(2, ["same"]) == ()
    assert house.clients.own(1, ["same", "unknown"]) == ("same",)
    assert house.clients.own(STARTER, ["same", "its own"]) == ("its own",)
    house.publish(Event("same", (1,)))
    assert [event.request for event in house.ends[1].events()] == ["same"]
    assert house.ends[2].quiet


def test_messages_of_all_are_taken_by_turns(house: House) -> None:
    for _ in range(3):
        house.ends[1].outbox.send(encode(Abort(("x",))))
    house.ends[2].outbox.send(encode(Abort(("y",))))
    house.starter.outbox.send(encode(Add(spec("z"))))
    taken: list[int] = []
    while len(taken) < 5:
        assert house.poller.poll(PATIENCE_MS)
        taken += [client for client, _ in house.clients.received()]
    assert sorted(taken) == [STARTER, 1, 1, 1, 2]


def test_who_leaves_is_billed_for_what_runs_and_for_what_nobody_has_counted(house: House) -> None:
    for name in ("running", "settled", "uncounted"):
        assert house.clients.brings(1, spec(name, (1, 2, 3, 4), max_tokens=9))
    assert house.clients.brings(2, spec("other"))
    end = FinishReason.LENGTH
    house.publish(
        Event("running", (5,), device_seconds=0.5),
        Event("settled", (5, 6), finish=end, device_seconds=1.0),
        Event("uncounted", (5, 6, 7), finish=end, device_seconds=2.0),
    )
    house.clients.settled(1, ["settled"])
    house.clients.settled(2, ["uncounted"])  # it is not the other's to settle
    house.clients.settled(1, ["running"])  # nor is it over
    assert house.clients.leave(1) == ("running",)
    (uncounted,) = house.lost()
    assert (uncounted.last.request, uncounted.last.device_seconds) == ("uncounted", 2.0)
    assert uncounted.last.tokens == ()
    assert (uncounted.prompt_tokens, uncounted.generation_tokens, uncounted.max_tokens) == (4, 3, 9)
    house.publish(Event("running", (6,), finish=FinishReason.ABORT, device_seconds=0.75))
    (aborted,) = house.lost()
    assert (aborted.last.device_seconds, aborted.generation_tokens) == (0.75, 2)
    assert not house.clients._sequences.keys() - {"other"}, "nothing is kept of who has gone"
    assert house.clients.leave(1) == ()


def test_a_new_one_gets_nothing_of_the_one_before(house: House) -> None:
    assert house.clients.brings(1, spec("a"))
    house.clients.leave(1)
    new = house.add(3)
    assert house.clients.brings(3, spec("b"))
    house.publish(Event("a", (1,), finish=FinishReason.ABORT), Event("b", (2,)))
    assert [event.request for event in new.events()] == ["b"]
    assert [each.last.request for each in house.lost()] == ["a"]


@pytest.mark.parametrize("seed", range(20))
def test_each_bill_reaches_exactly_one(tmp_path: Path, seed: int) -> None:
    """Requests come, run, end and are settled, and processes die, in any order."""
    house, draw = House(tmp_path), random.Random(seed)
    sent = counted = 0.0
    seen: dict[str, float] = {}
    running: dict[str, int] = {}
    bereaved: set[str] = set()
    unsettled: dict[int, list[str]] = {1: [], 2: []}
    number = 2
    try:
        for turn in range(120):
            choice = draw.random()
            if choice < 0.4:
                client = draw.choice(list(house.ends))
                assert house.clients.brings(client, spec(f"r{turn}"))
                running[f"r{turn}"] = client
            elif choice < 0.75 and running:
                name = draw.choice(list(running))
                client, bill = running.pop(name), draw.randint(1, 1000) / 1024
                finish = FinishReason.ABORT if name in bereaved else FinishReason.STOP
                house.publish(Event(name, (1,), finish=finish, device_seconds=bill))
                sent += bill
                if name not in bereaved:
                    (event,) = house.ends[client].events()
                    assert event.request == name
                    seen[name] = event.device_seconds
                    unsettled[client].append(name)
            elif choice < 0.95:
                client = draw.choice(list(house.ends))
                for name in unsettled[client]:
                    counted += seen.pop(name)
                house.clients.settled(client, unsettled[client])
                unsettled[client] = []
            else:
                client = draw.choice(list(house.ends))
                house.ends.pop(client).close()
                mine = {name for name, whose in running.items() if whose == client}
                assert set(house.clients.leave(client)) == mine
                bereaved |= mine
                number += 1
                house.add(number)
                unsettled[number] = []
        house.publish(*(Event(name, finish=FinishReason.ABORT, device_seconds=0.25) for name in running))
        sent += 0.25 * len(running)
        for client, end in house.ends.items():
            if client in running.values():
                counted += sum(event.device_seconds for event in end.events())
            counted += sum(seen.pop(name) for name in unsettled[client])
        while house.starter.inbox.poll(100):
            message = decode_from_engine(house.starter.inbox.recv())
            if isinstance(message, Lost):
                counted += sum(sequence.last.device_seconds for sequence in message.sequences)
        assert counted == sent
    finally:
        house.context.destroy(linger=0)
