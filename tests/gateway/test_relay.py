"""One attempt, and how long it waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from penstock.gateway import relay
from penstock.gateway.endpoints import ENDPOINTS
from penstock.gateway.relay import Exchange, Relay
from penstock.gateway.stations import Station
from penstock.http.deadline import Deadline

from .upstream import Upstream, Wire, answer, cut, event, events

CHAT = next(each for each in ENDPOINTS if each.path == "/v1/chat/completions")


async def error_behind_a_token(wire: Wire) -> None:
    """Both come at once."""
    await wire.stream()
    await wire.chunk(events(wire.asked)[0])
    await wire.read_by_client()
    await wire.chunk(events(wire.asked)[1] + event({"error": {"message": "out of memory"}}))


@pytest.mark.parametrize("behaviour", [answer, cut, error_behind_a_token])
def test_no_time_runs_while_the_client_is_written_to(behaviour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a deadline took from a client that reads slowly would be missing in its stream: whoever goes on
    with that begins behind it."""
    deadlines: list[Deadline] = []

    class Noted(Deadline):
        def __init__(self, seconds: float) -> None:
            super().__init__(seconds)
            deadlines.append(self)

    monkeypatch.setattr(relay, "Deadline", Noted)
    upstream = Upstream(default=behaviour).start()
    running: list[bool] = []
    told = b""

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal told
        running.append(deadlines[-1]._timer is not None and deadlines[-1]._when is not None)
        told += message.get("body", b"")
        if told:
            upstream.go()

    async def work() -> None:
        station = Station("e", upstream.url, "openai", headers={})
        body = b'{"stream":true}'
        await Relay(station, CHAT, Exchange(), send).run(
            body, {}, usage_wanted=False, stream=True, extra=list
        )
        await station.close()

    asyncio.run(work())
    upstream.stop()
    assert b"Hello" in told
    assert len(running) >= 3
    assert not any(running)
