"""`penstock serve MODEL`: an engine in a process of its own, and the HTTP API in this one.

With --api-server-count, the API has processes of its own as well (api_servers).

The engine's process starts first, so that it imports torch and reads weights while this one imports the
server and the tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig
from penstock.observe import logs
from penstock.server.config import ServerConfig

from .flags import add_config, add_config_file, add_vllm_flags, make_config

if TYPE_CHECKING:
    import socket

    from penstock.engine.remote import RemoteEngine
    from penstock.server.batches.desk import Desk

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
    server_config: ServerConfig = make_config(
        ServerConfig,
        args,
        api_key=environment_keys(os.environ),
        gateway_key=_split(os.environ.get("PENSTOCK_GATEWAY_KEY", "")),
    )
    check_files(engine_config, server_config)
    if not server_config.served_model_name:
        server_config = replace(server_config, served_model_name=(engine_config.model,))
    need_engine()
    # the server reads its TLS files again; until then, and in the engine's process, it is for nobody
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # until the server drains on SIGTERM, it ends the start, cleanly
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    level = server_config.uvicorn_log_level.replace("trace", "debug")
    logs.configure("api", level=level, format=server_config.log_format)
    from penstock.http.bind import bind

    with bind(server_config) as sock:  # who cannot have the port need not load a model
        return _run(engine_config, server_config, sock, level)


def _run(engine_config: EngineConfig, server_config: ServerConfig, sock: socket.socket, level: str) -> int:
    from penstock.engine.remote import RemoteEngine

    try:
        engine = RemoteEngine.launch(engine_config, log_level=level, log_format=server_config.log_format)
    except OSError as error:  # no directory for its sockets, no process
        raise StartupError(
            f"the engine's process cannot be started: {error}.",
            advice="It needs a writable directory for temporary files; TMPDIR names one.",
        ) from error
    try:
        from .api import loop_factory

        work: Coroutine[None, None, int]
        if server_config.api_server_count > 1:
            from .api_servers import ApiServers

            work = ApiServers(engine, engine_config, server_config, sock).run()
        else:
            from penstock.text.template_pool import pool

            pool().start()  # it imports jinja2 while the engine loads
            work = _serve(engine, engine_config, server_config, sock)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(work)
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
    ours = _split(environment.get("PENSTOCK_API_KEY", ""))
    theirs = environment.get("VLLM_API_KEY", "")
    return (*ours, *([theirs] if theirs else []))


def _split(keys: str) -> tuple[str, ...]:
    return tuple(key for key in keys.split(",") if key.strip())


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
    from penstock.server.stats_log import StatsLog

    from .api import announce, create

    desks: list[Desk] = []
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        app, template = await create(engine, engine_config, server_config, desks.append)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    if not engine_config.disable_log_stats:
        engine.on_stats(StatsLog(time.monotonic))
    serving = announce(server_config, sock, template=template)

    def started() -> None:
        serving()
        for desk in desks:
            desk.worker.start()

    try:
        return await serve(app, server_config, engine, sock, name="engine", on_started=started)
    finally:
        for desk in desks:
            await desk.worker.close()
