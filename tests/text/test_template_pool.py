"""The processes that run chat templates: kept, replaced, ended, and told apart by how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import Unavailable
from penstock.text.template_pool import WORKERS, Limits, TemplateError, TemplatePool, Worker
from penstock.text.template_worker import ANSWER, FAILED, NO_MEMORY, REFUSED, TEXT, TOO_LONG

LIMITS = Limits(seconds=30.0, characters=1000)


@pytest.fixture
def pool() -> Iterator[TemplatePool]:
    made = TemplatePool()
    yield made
    made.close()


def process(pool: TemplatePool) -> int:
    """Id of the only worker that is free."""
    (worker,) = pool._free
    return worker._process.pid


def test_limits_unless_told() -> None:
    assert Limits() == Limits(2.0, 16_777_216, 268_435_456)


def test_a_worker_is_kept_for_the_next(pool: TemplatePool) -> None:
    pool.start()
    first = process(pool)
    pool.start()
    assert process(pool) == first  # one is ready: that is enough
    for number in range(3):
        assert pool.run("{{ n }}", {"n": number}, LIMITS) == str(number)
    assert process(pool) == first
    with pytest.raises(TemplateError) as caught:
        pool.run("{{ raise_exception('no') }}", {}, LIMITS)
    assert (caught.value.kind, str(caught.value)) == ("refused", "no")
    assert process(pool) == first


def test_a_worker_that_was_ended_is_replaced(pool: TemplatePool) -> None:
    assert pool.run("x", {}, LIMITS) == "x"
    (worker,) = pool._free
    os.kill(process(pool), signal.SIGKILL)
    worker._process.wait(10)
    assert not worker.alive
    assert pool.run("y", {}, LIMITS) == "y"
    assert process(pool) != worker._process.pid


def test_a_template_without_end_takes_its_worker_along(pool: TemplatePool) -> None:
    assert pool.run("x", {}, LIMITS) == "x"
    (worker,) = pool._free
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError) as caught:
        pool.run(endless, {}, Limits(seconds=0.2, characters=1000))
    assert caught.value.kind == "time"
    assert worker._process.poll() == -signal.SIGALRM
    assert process(pool) != worker._process.pid  # and another is ready
    assert pool.run("y", {}, LIMITS) == "y"


def test_a_closed_pool_has_no_processes(pool: TemplatePool) -> None:
    pool.start()
    (worker,) = pool._free
    assert worker.alive
    pool.close()
    assert worker._process.returncode == -signal.SIGKILL  # waited for, so that nobody is left behind
    assert not pool._free


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (signal.SIGALRM, "time", ""),
        (signal.SIGKILL, "memory", ""),
        (signal.SIGTERM, "failed", "its process ended with status -15"),
    ],
)
def test_how_a_process_ended_says_why(number: signal.Signals, kind: str, said: str) -> None:
    worker = Worker()
    try:
        os.kill(worker._process.pid, number)
        worker._process.wait(10)
        with pytest.raises(TemplateError) as caught:
            worker.ask(b"", LIMITS)
        assert (caught.value.kind, str(caught.value)) == (kind, said)
    finally:
        worker.close()


def answered(kind: bytes, text: bytes, length: int | None = None) -> tuple[bytes, bytes, bool]:
    """What is made of an answer with these bytes, and this length if it lies."""
    worker = Worker.__new__(Worker)
    worker._socket, other = socket.socketpair()
    with worker._socket, other:
        writer = threading.Thread(
            target=other.sendall,
            args=(ANSWER.pack(kind, b"1", len(text) if length is None else length) + text,),
        )
        writer.start()
        try:
            return worker.ask(b"request", LIMITS)
        finally:
            worker._socket.shutdown(socket.SHUT_RDWR)
            writer.join(10)


def test_an_answer_is_no_longer_than_its_characters_can_be() -> None:
    most = 4 * 1000 + 65_536  # bytes of UTF-8, and a message
    assert answered(TEXT, b"x" * most) == (TEXT, b"x" * most, True)
    with pytest.raises(TemplateError) as caught:
        answered(TEXT, b"", length=most + 1)
    assert caught.value.kind == "length"


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [(REFUSED, "refused"), (FAILED, "failed"), (TOO_LONG, "length"), (NO_MEMORY, "memory"), (b"?", "failed")],
)
def test_every_kind_of_answer_has_its_name(
    kind: bytes, wanted: str, pool: TemplatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "ask", lambda self, request, limits: (kind, b"why", True))
    with pytest.raises(TemplateError) as caught:
        pool.run("x", {}, LIMITS)
    assert (caught.value.kind, str(caught.value)) == (wanted, "why")


def test_a_worker_that_says_so_is_not_asked_again(
    pool: TemplatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.start()
    first = process(pool)
    monkeypatch.setattr(Worker, "ask", lambda self, request, limits: (TEXT, b"x", False))
    assert pool.run("x", {}, LIMITS) == "x"
    assert process(pool) != first


def test_a_worker_has_none_of_our_secrets(pool: TemplatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    pool.start()
    page = Path(f"/proc/{process(pool)}/environ")
    while not (written := page.read_bytes()):  # the kernel is still in the midst of exec
        assert page.exists()
    environment = written.split(b"\0")
    names = {entry.partition(b"=")[0].decode() for entry in environment if entry}
    assert {"PATH", "LC_ALL", "PYTHONHASHSEED"} <= names
    assert "API_KEY" not in names
    allowed = {"PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
    assert {name for name in names if not name.startswith(("PYTHON", "LC_"))} <= allowed


def test_no_more_than_two_run_at_a_time(pool: TemplatePool) -> None:
    assert WORKERS == 2
    assert [pool._places.acquire(blocking=False) for _ in range(3)] == [True, True, False]
    assert pool._threads._max_workers == 2


def test_whoever_has_waited_too_long_is_sent_away(pool: TemplatePool) -> None:
    assert asyncio.run(pool.in_thread(LIMITS, lambda: "done")) == "done"
    with pytest.raises(Unavailable, match="of other requests take too long") as caught:
        asyncio.run(pool.in_thread(Limits(seconds=0.0), lambda: "done"))
    assert caught.value.retry_after == 1


def test_no_process_to_be_had_is_no_fault_of_the_client(
    pool: TemplatePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Worker) -> None:
        raise OSError("too many processes")

    monkeypatch.setattr(Worker, "__init__", fails)
    pool.start()  # who needs one hears of it
    with pytest.raises(Unavailable, match="no process for chat templates can be started: too many"):
        pool.run("x", {}, LIMITS)
    assert pool._places.acquire(blocking=False)
