"""`penstock serve MODEL`: an engine in a process of its own, and the HTTP API in this one.

The engine's process starts first, so that it imports torch and reads weights while this one imports the
server and the tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig
from penstock.server.config import ServerConfig

from .flags import add_config, add_config_file, add_vllm_flags, make_config

if TYPE_CHECKING:
    import socket

    from penstock.engine.remote import RemoteEngine
    from penstock.model.generation import GenerationConfig
    from penstock.text.chat_template import ChatTemplate
    from penstock.text.tokenizer import Tokenizer

logger = logging.getLogger("penstock.server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine and of the server."""
    add_config_file(parser)
    add_config(parser, EngineConfig, "engine")
    add_config(parser, ServerConfig, "server")
    add_vllm_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns 0 after a complete drain."""
    engine_config: EngineConfig = make_config(EngineConfig, args)
    server_config: ServerConfig = make_config(ServerConfig, args, api_key=environment_keys(os.environ))
    check_files(engine_config, server_config)
    if not server_config.served_model_name:
        server_config = replace(server_config, served_model_name=(engine_config.model,))
    need_engine()
    # the server reads its TLS files again; until then, and in the engine's process, it is for nobody
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # until the server drains on SIGTERM, it ends the start, cleanly
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    level = server_config.uvicorn_log_level.replace("trace", "debug")
    logging.basicConfig(level=level.upper(), format="%(levelname)-7s %(message)s", stream=sys.stderr)
    from penstock.engine.remote import RemoteEngine

    try:
        engine = RemoteEngine.launch(engine_config, log_level=level)
    except OSError as error:  # no directory for its sockets, no process
        raise StartupError(
            f"the engine's process cannot be started: {error}.",
            advice="It needs a writable directory for temporary files; TMPDIR names one.",
        ) from error
    try:
        from penstock.http.serve import bind
        from penstock.text.template_pool import pool

        pool().start()  # it imports jinja2 while the engine loads

        sock = bind(server_config)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(engine, engine_config, server_config, sock))
    except KeyboardInterrupt:
        logger.info("stopped while loading")
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        logger.info("stopped while loading")
        return 128 + signal.SIGTERM
    finally:
        engine.kill()


def environment_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The API keys that stand in the environment; --api-key takes precedence, as in vLLM.

    PENSTOCK_API_KEY holds several, with commas between them; VLLM_API_KEY is one, whatever it holds.
    """
    ours = (key for key in environment.get("PENSTOCK_API_KEY", "").split(",") if key.strip())
    theirs = environment.get("VLLM_API_KEY", "")
    return (*ours, *([theirs] if theirs else []))


def check_files(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """Find what is wrong with files that are needed after the model: loading it may take minutes."""
    if server_config.chat_template is not None:
        from penstock.text.chat_template import read_override

        read_override(server_config.chat_template)
    if engine_config.generation_config not in ("auto", "vllm"):
        from penstock.model.generation import generation_defaults

        generation_defaults(engine_config.generation_config, Path())


def need_engine() -> None:
    """The core package has no engine: say so before a process fails to import it."""
    missing = [
        name for name in ("torch", "tokenizers", "safetensors") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise StartupError(
            f"serving needs {', '.join(missing)}, which is not installed here.",
            advice='Install the engine with: pip install "penstock[engine]".',
        )


async def _serve(
    engine: RemoteEngine, engine_config: EngineConfig, server_config: ServerConfig, sock: socket.socket
) -> int:
    from penstock.http.serve import serve
    from penstock.server.app import create_app
    from penstock.server.stats_log import StatsLog

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        tokenizer, template, generation = await _load(engine, engine_config, server_config)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    info = engine.info
    app = create_app(
        engine,
        tokenizer,
        template.for_context(info.max_model_len),
        server_config,
        default_sampling=generation.sampling,
        scheduling_policy=engine_config.scheduling_policy,
        enable_prefix_caching=engine_config.enable_prefix_caching,
    )
    if not engine_config.disable_log_stats:
        engine.on_stats(StatsLog(time.monotonic))
    if not template.available:
        logger.warning("the model has no chat template: /v1/chat/completions will answer 400")
    if keys := len(server_config.api_key):
        logger.info("an API key is required: %d %s accepted", keys, "key is" if keys == 1 else "keys are")
    else:
        logger.warning("no API key is required: whoever reaches this server may use it (--api-key)")
    host, port = sock.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::") else host
    scheme = "https" if server_config.ssl_certfile else "http"

    def started() -> None:
        logger.info(
            "serving %s at %s://%s:%d/v1", ", ".join(server_config.served_model_name), scheme, shown, port
        )

    return await serve(app, server_config, engine, sock, name="engine", on_started=started)


async def _load(
    engine: RemoteEngine, config: EngineConfig, server_config: ServerConfig
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
        load_config(directory)
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
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
