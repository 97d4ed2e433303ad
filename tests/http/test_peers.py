"""Processes that accept on one socket: who has fewest takes the next connection."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError, Unavailable
from penstock.http import ids
from penstock.http.bind import bind
from penstock.http.config import HttpConfig
from penstock.http.peers import Peers
from penstock.http.serve import serve

from .conftest import make_app


def page(tmp_path: Path, count: int) -> list[Peers]:
    """All processes' views of one page."""
    path = tmp_path / "connections"
    Peers.create(path, count)
    return [Peers(path, index, count) for index in range(count)]


def test_who_has_fewest_knows_it(tmp_path: Path) -> None:
    one, two, three = page(tmp_path, 3)
    one.tell(0)
    assert one.fewest, "the others do not accept yet"
    two.tell(0)
    three.tell(4)
    assert [one.fewest, two.fewest, three.fewest] == [True, True, False]
    one.tell(5)
    two.tell(6)
    assert [one.fewest, two.fewest, three.fewest] == [False, False, True]
    three.leave()
    assert [one.fewest, two.fewest, three.fewest] == [True, False, False]


class Idle:
    """A worker that has nothing to do until it fails."""

    failure: PenstockError | None = None
    load = 0

    async def drain(self, timeout: float) -> None:
        pass

    async def close(self) -> None:
        pass


def test_connections_are_shared_out_equally_and_a_busy_process_holds_nobody_up(tmp_path: Path) -> None:
    """Two loops in two threads; then one of them stands still."""
    config = HttpConfig(host="127.0.0.1", port=0, timeout_keep_alive=60)
    sock = bind(config)
    port = sock.getsockname()[1]
    peers = page(tmp_path, 2)
    workers = [Idle(), Idle()]
    serving = [threading.Event(), threading.Event()]
    still, go_on = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run(index: int) -> None:
        loops.append(asyncio.get_running_loop())
        await serve(
            make_app(config),
            config,
            workers[index],
            sock.dup(),
            on_started=serving[index].set,
            handle_signals=False,
            peers=peers[index],
        )

    def stand_still() -> None:
        still.set()
        go_on.wait(30)

    threads = [threading.Thread(target=asyncio.run, args=(run(index),)) for index in range(2)]
    clients: list[socket.socket] = []

    def connect(count: int) -> None:
        """And be heard."""
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", port), 30)
            clients.append(client)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")

    def counts() -> list[int]:
        return [int(count) for count in peers[0]._layout.unpack(peers[0]._page[:16])]

    try:
        for thread in threads:
            thread.start()
        assert all(each.wait(30) for each in serving)
        connect(10)
        assert sorted(counts()) == [5, 5]
        loops[0].call_soon_threadsafe(stand_still)
        assert still.wait(30)
        connect(6)
        assert sorted(counts()) == [5, 11]
    finally:
        go_on.set()
        for worker in workers:
            worker.failure = Unavailable("enough")
        for client in clients:
            client.close()
        for thread in threads:
            thread.join(30)
        sock.close()
    assert not any(thread.is_alive() for thread in threads)
    assert not peers[0].fewest or not peers[1].fewest or counts_are_infinite(peers[0])


def counts_are_infinite(peers: Peers) -> bool:
    """Nobody accepts any more."""
    return set(peers._layout.unpack(peers._page[:16])) == {float("inf")}


def test_ids_of_two_processes_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clients' own ids are, also those that look like ours."""
    monkeypatch.setattr(ids, "_numbers", ids._numbers)
    made = []
    for process in (1, 2, 11, 12):
        ids.number_as(process)
        for given in ("same", "same#1.1", "same#2.1", "", "same#1", "1.1", "x#"):
            for _ in range(3):
                scope = {"client_request_id": given, "request_id": "fresh"}
                made.append(ids.response_id("cmpl", scope, None).engine)
    assert len(set(made)) == len(made)
