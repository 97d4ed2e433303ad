"""What an answer is on the wire, write by write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from penstock.http.cycle import Cycle


class Transport:
    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert data
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True


def cycle(method: str = "GET", *, keep_alive: bool = True) -> tuple[Cycle, Transport]:
    transport: Any = Transport()
    logger = logging.getLogger("test")
    made = Cycle(
        scope={"method": method},  # type: ignore[typeddict-item]
        transport=transport,
        flow=FlowControl(transport),
        logger=logger,
        access_logger=logger,
        access_log=False,
        default_headers=[(b"date", b"now")],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=keep_alive,
        on_response=lambda: None,
    )
    return made, transport


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


HEAD = b"HTTP/1.1 200 OK\r\ndate: now\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
LENGTH = (b"Content-Length", b"2")


@pytest.mark.parametrize(
    ("method", "messages", "written"),
    [
        ("GET", [start(LENGTH), body(b"{}")], [HEAD + b"content-length: 2\r\n\r\n{}"]),
        ("GET", [start(), body(b"ab")], [CHUNKED + b"2\r\nab\r\n0\r\n\r\n"]),
        (
            "GET",
            [start(), body(b"ab", more=True), body(b"c", more=True), body()],
            [CHUNKED + b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n"],
        ),
        ("GET", [start(), body(more=True), body(b"c")], [CHUNKED, b"1\r\nc\r\n0\r\n\r\n"]),
        ("HEAD", [start(LENGTH), body(b"{}")], [HEAD + b"content-length: 2\r\n\r\n"]),
        ("GET", [start(status=204), body()], [b"HTTP/1.1 204 No Content\r\ndate: now\r\n\r\n"]),
    ],
    ids=["whole", "chunked", "stream", "empty piece", "HEAD", "204"],
)
def test_a_head_leaves_with_what_follows_at_once(
    method: str, messages: Sequence[dict[str, Any]], written: list[bytes]
) -> None:
    async def work() -> None:
        made, transport = cycle(method)
        for message in messages:
            await made.send(message)
        await asyncio.sleep(0)
        assert transport.writes == written
        assert made.response_complete
        assert not transport.closed

    run(work)


def test_a_head_that_nothing_follows_leaves_by_itself() -> None:
    async def work() -> None:
        made, transport = cycle()
        await made.send(start())
        assert transport.writes == []
        await asyncio.sleep(0)
        assert transport.writes == [CHUNKED]
        await made.send(body(b"ab"))
        assert transport.writes[1:] == [b"2\r\nab\r\n0\r\n\r\n"]

    run(work)


def test_a_long_body_is_not_copied() -> None:
    async def work() -> None:
        made, transport = cycle()
        data = b"x" * (1 << 20)
        await made.send(start((b"content-length", b"%d" % len(data))))
        await made.send(body(data))
        assert transport.writes[1] is data

    run(work)


@pytest.mark.parametrize("said", [True, False])
def test_the_last_answer_of_a_connection_says_so(said: bool) -> None:
    async def work() -> None:
        made, transport = cycle(keep_alive=said)
        await made.send(start(LENGTH, *([(b"Connection", b"a, Close")] if said else [])))
        await made.send(body(b"{}"))
        assert transport.writes[0].lower().count(b"close\r\n") == 1
        assert transport.closed

    run(work)


@pytest.mark.parametrize(
    "messages",
    [
        [body(b"x")],
        [start(), start()],
        [start(LENGTH), body(b"{} ")],
        [start(LENGTH), body(b"{")],
        [start(LENGTH), body(b"{}"), body(b"{}")],
        [start((b"a b", b"c"))],
        [start((b"a", b"b\r\nc: d"))],
    ],
    ids=["no head", "two heads", "too long", "too short", "more", "a bad name", "a bad value"],
)
def test_what_is_no_answer_is_an_error(messages: Sequence[dict[str, Any]]) -> None:
    async def work() -> None:
        made, transport = cycle()
        for message in messages[:-1]:
            await made.send(message)
        with pytest.raises(RuntimeError):
            await made.send(messages[-1])
        await asyncio.sleep(0)
        assert b"{} " not in b"".join(transport.writes)

    run(work)


def test_who_has_gone_gets_nothing() -> None:
    async def work() -> None:
        made, transport = cycle()
        await made.send(start())
        made.disconnected = True
        await made.send(body(b"x"))
        await asyncio.sleep(0)
        assert transport.writes == []

    run(work)
