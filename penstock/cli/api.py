"""The HTTP API of an engine that starts or runs: what it reads of the model, and what is said of it.

Used by the one API process that there is (serve), and by each of several (api_process).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from penstock.engine.config import EngineConfig
from penstock.http.bind import address
from penstock.server.config import ServerConfig

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

    from penstock.engine.client import EngineClient
    from penstock.model.generation import GenerationConfig
    from penstock.server.batches.desk import Desk
    from penstock.text.chat_template import ChatTemplate
    from penstock.text.tokenizer import Tokenizer

    class Engine(EngineClient, Protocol):
        """One that may still be loading."""

        async def start(self) -> None:
            """Wait until it is ready. Raises what stopped it."""


logger = logging.getLogger("penstock.server")


async def create(
    engine: Engine,
    engine_config: EngineConfig,
    server_config: ServerConfig,
    on_desk: Callable[[Desk], None] | None = None,
) -> tuple[ASGIApp, bool]:
    """The application, when the engine is ready, and whether the model has a chat template."""
    from penstock.server.app import create_app

    tokenizer, template, generation = await _load(engine, engine_config, server_config)
    app = create_app(
        engine,
        tokenizer,
        template.for_context(engine.info.max_model_len),
        server_config,
        default_sampling=generation.sampling,
        scheduling_policy=engine_config.scheduling_policy,
        enable_prefix_caching=engine_config.enable_prefix_caching,
        on_desk=on_desk,
    )
    return app, template.available


def announce(config: ServerConfig, sock: socket.socket, *, template: bool) -> Callable[[], None]:
    """Say who may use the server and for what; returns what says that it serves, for when it does."""
    if not template:
        logger.warning("the model has no chat template: /v1/chat/completions will answer 400")
    if keys := len(config.api_key) + len(config.gateway_key):
        logger.info("an API key is required: %d %s accepted", keys, "key is" if keys == 1 else "keys are")
    else:
        logger.warning("no API key is required: whoever reaches this server may use it (--api-key)")
    names, where = ", ".join(config.served_model_name), address(config, sock)

    def serving() -> None:
        logger.info("serving %s at %s%s", names, where, "" if config.uds else "/v1")

    return serving


async def _load(
    engine: Engine, config: EngineConfig, server_config: ServerConfig
) -> tuple[Tokenizer, ChatTemplate, GenerationConfig]:
    """What the API needs of the model, while the engine starts.

    What is wrong with the model's files is found here, before the engine has imported torch: nobody waits for
    that, nor for weights whose tokenizer is broken.
    """
    from penstock.model.checkpoint import find_safetensors
    from penstock.model.config import load_config
    from penstock.model.generation import generation_defaults
    from penstock.model.hub import is_local, resolve_model
    from penstock.text.chat_template import ChatTemplate
    from penstock.text.template_pool import Limits
    from penstock.text.tokenizer import Tokenizer

    def load(directory: Path) -> tuple[Tokenizer, ChatTemplate, GenerationConfig]:
        load_config(directory, config.hf_overrides)
        generation = generation_defaults(config.generation_config, directory)
        if config.load_format != "dummy":
            find_safetensors(directory)
        tokenizer = Tokenizer.from_directory(directory)
        limits = Limits(server_config.chat_template_timeout)
        template = ChatTemplate.from_tokenizer(tokenizer, server_config.chat_template, limits)
        return tokenizer, template, generation

    if not is_local(config.model):  # the engine downloads it; then there is a directory
        await engine.start()
        return await asyncio.to_thread(load, Path(engine.info.path))
    directory = resolve_model(config.model, config.revision, config.download_dir)
    starting = asyncio.ensure_future(engine.start())
    loading = asyncio.ensure_future(asyncio.to_thread(load, directory))
    try:
        await asyncio.wait((starting, loading), return_when=asyncio.FIRST_EXCEPTION)
        if loading.done():
            loading.result()
        await starting
        return await loading
    finally:
        for task in (starting, loading):
            task.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await task


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loops where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
