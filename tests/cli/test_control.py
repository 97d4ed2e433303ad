"""What API processes and their starter tell each other arrives as it was."""

from __future__ import annotations

import asyncio
import dataclasses
import socket

import msgspec

from penstock.cli.control import (
    Channel,
    Died,
    Error,
    Listen,
    Loaded,
    Message,
    Refused,
    Serving,
    Setup,
    Signal,
)
from penstock.core.errors import BY_NAME, EngineDead, ModelLoadError, StartupError
from penstock.engine.config import EngineConfig
from penstock.server.config import ServerConfig

SETUP = Setup(
    engine=EngineConfig(model="/m", max_model_len=77, kv_cache_memory_bytes=1 << 30, seed=2**62),
    server=ServerConfig(
        host="::1",
        api_key=("a,b", "ü" * 1000),
        allowed_origins=("https://a.example",),
        served_model_name=("one", "two"),
        default_chat_template_kwargs={"enable_thinking": False, "list": [1, {"x": None}]},
        shutdown_timeout=0.5,
    ),
    directory="/tmp/x",
    index=2,
    count=3,
    client=9,
    listener=7,
    log_level="debug",
    first=False,
)
MESSAGES: list[Message] = [
    SETUP,
    Listen(),
    Signal(15),
    Died(Error.of(EngineDead("it", advice="do"))),
    Loaded(True),
    Refused(Error.of(ModelLoadError("no", param="--model", advice="yes"))),
    Serving(),
]


def test_messages_arrive_whole_in_order_and_end_with_the_channel() -> None:
    async def talk() -> list[Message]:
        ends = socket.socketpair()
        one, two = [Channel(*await asyncio.open_connection(sock=end)) for end in ends]
        for message in MESSAGES:
            one.tell(message)
        one.close()
        one.tell(Serving())  # nobody hears it
        heard = []
        while (message := await two.hear()) is not None:
            heard.append(message)
        two.close()
        return heard

    assert asyncio.run(asyncio.wait_for(talk(), 30)) == MESSAGES


def test_every_setting_of_a_server_travels() -> None:
    """Whatever its type: a new one that does not is found here."""
    for config in (EngineConfig(), ServerConfig(), SETUP.engine, SETUP.server):
        again = msgspec.json.decode(msgspec.json.encode(config), type=type(config))
        assert again == config
        for field in dataclasses.fields(config):
            assert type(getattr(again, field.name)) is type(getattr(config, field.name)), field.name


def test_errors_keep_what_they_say() -> None:
    for kind in BY_NAME.values():
        error = Error.of(kind("what", param="--flag", advice="do this")).exception()
        assert type(error) is kind
        assert (error.message, error.param, error.advice) == ("what", "--flag", "do this")
    assert isinstance(Error("Unknown", "what").exception(), StartupError)


def test_half_a_message_is_the_end() -> None:
    async def talk() -> object:
        ours, theirs = socket.socketpair()
        with ours:
            channel = Channel(*await asyncio.open_connection(sock=theirs))
            ours.sendall(b"\0\0\0\x20{")
            ours.shutdown(socket.SHUT_RDWR)
            try:
                return await channel.hear()
            finally:
                channel.close()

    assert asyncio.run(asyncio.wait_for(talk(), 30)) is None
