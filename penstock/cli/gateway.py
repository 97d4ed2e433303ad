"""`penstock gateway penstock.yaml`: the gateway alone, in front of the upstreams of a spec.

    spec ─▶ port bound ─▶ keys, meter, stations ─▶ listens ─▶ SIGTERM: drains

Flags win over what the file says under `gateway:`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import StartupError
from penstock.http.config import HttpConfig
from penstock.observe import logs
from penstock.spec import Spec, load

from .flags import add_config, make_config

if TYPE_CHECKING:
    import socket

    from penstock.gateway.door import Door
    from penstock.http.serve import Server, Worker

logger = logging.getLogger("penstock.gateway")

_ADMIN_CONNECTIONS = 64
"""Of the admin API, where it has a port of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, and the flags of the listener."""
    parser.add_argument("file", nargs="?", default="penstock.yaml", help="default: penstock.yaml")
    add_config(parser, HttpConfig, "gateway")
    parser.usage = f"{parser.prog} [FILE] [flags]"


def run(args: argparse.Namespace) -> int:
    """Run until a signal. Returns 0 after a complete drain."""
    spec = load(Path(args.file))
    config = http_config(spec, args)
    logs.configure("gateway", level=config.uvicorn_log_level, format=config.log_format)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if spec.models:
        names = ", ".join(list(spec.models)[:8])
        if not spec.upstreams:
            raise StartupError(
                f"{args.file}: nothing stands under upstreams:, and {names} are started by `penstock up`.",
                advice="Run `penstock up`, or name the servers that there are under upstreams:.",
            )
        logger.warning("models of the spec are started by `penstock up`, and are not served here: %s", names)
    from penstock.http.bind import bind, listen

    from .api import loop_factory

    def serve_one(alone: bool) -> int:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(spec, config, sock, admin, alone))

    sock = bind(config)
    admin: socket.socket | None = None
    try:
        admin = bind_admin(spec, config)
        if spec.gateway.workers == 1:
            return serve_one(True)
        from penstock.gateway import workers

        first_key = workers.in_child(lambda: prepare(spec))
        listen(sock, config)  # who comes before a worker has started waits in the socket's queue
        announce(config, sock, first_key)
        return workers.run(spec.gateway.workers, lambda: serve_one(False))
    finally:
        sock.close()
        if admin is not None:
            admin.close()


def http_config(spec: Spec, args: argparse.Namespace | None = None) -> HttpConfig:
    """How the gateway listens: flags, then the spec, then defaults."""
    gateway = spec.gateway
    said: dict[str, Any] = {
        "host": gateway.host,
        "port": gateway.port,
        "max_body_bytes": gateway.max_body_bytes,
        "trusted_proxies": gateway.trusted_proxies,
        "ssl_certfile": gateway.ssl_certfile,
        "ssl_keyfile": gateway.ssl_keyfile,
        "enable_ssl_refresh": True,
        "disable_uvicorn_access_log": True,  # the ledger has a row for each request
    }
    config: HttpConfig = make_config(HttpConfig, args or argparse.Namespace(), **said)
    if config.api_key:
        raise StartupError(
            "--api-key is none of the gateway's flags: its keys are in its store, and are no secrets of a "
            "command line.",
            param="--api-key",
            advice="Create one with `penstock keys create`.",
        )
    return config


def admin_config(spec: Spec, config: HttpConfig) -> HttpConfig | None:
    """How the admin API listens, with the gateway's certificate; None where it has no port of its own."""
    wanted = spec.gateway.admin
    if wanted is None or wanted.port is None:
        return None
    return replace(config, host=wanted.host, port=wanted.port, uds=None, max_connections=_ADMIN_CONNECTIONS)


def bind_admin(spec: Spec, config: HttpConfig) -> socket.socket | None:
    """The socket of the admin API, which listens, where it has a port of its own. Raises StartupError."""
    from penstock.http.bind import address, bind, listen

    own = admin_config(spec, config)
    if own is None:
        return None
    try:
        sock = bind(own)
        listen(sock, own)
    except StartupError as error:
        raise StartupError(
            f"The admin API cannot listen: {error.message}",
            param="gateway.admin",
            advice="Choose another host or port under gateway.admin.",
        ) from error
    logger.info("the admin API is at %s/admin/v1", address(own, sock))
    return sock


def beside(
    spec: Spec, config: HttpConfig, door: Door, admin: socket.socket | None
) -> list[tuple[Server, socket.socket]]:
    """What listens beside the gateway."""
    from penstock.gateway.app import create_admin_app
    from penstock.http.serve import Server

    own = admin_config(spec, config)
    if own is None or admin is None:
        return []
    return [(Server(create_admin_app(door, own), own), admin)]


def prepare(spec: Spec) -> str | None:
    """Migrate the database and make the first key, once for all workers; returns it."""
    from .api import loop_factory

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_prepare(spec))


async def _prepare(spec: Spec) -> str | None:
    from penstock.gateway.opening import open_door

    door, first_key = await open_door(spec, None)
    await door.close()
    return first_key


def announce(config: HttpConfig, sock: socket.socket, first_key: str | None) -> None:
    """Say on standard output where the gateway is, and its first key."""
    from penstock.http.bind import address

    print(f"The gateway is at {address(config, sock)}/v1", flush=True)
    if first_key is not None:
        print(f"The first key, shown this once: {first_key}", flush=True)


def settle() -> None:
    """What is there now stays: collections need not look at it again. And they come after 5,000 more objects
    instead of 700, since with a hundred requests at a time most of what they see is in use (a fifth of all
    time). After 50,000 they cost the least, and hold everybody up for 50 to 100 ms. What is old is looked
    at each fifth time: rings that die there had taken 70 MiB until the hundredth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 5)


async def serve_door(
    spec: Spec,
    config: HttpConfig,
    door: Door,
    sock: socket.socket,
    admin: socket.socket | None,
    *,
    alone: bool,
    worker: Worker | None = None,
    first_key: str | None = None,
) -> int:
    """Serve requests at a door that is open, until a signal. Returns the exit status.

    Args:
        alone: no other process serves at `sock`: this one hears signals itself, and says where it is.
        worker: what ends with the door, where that is more than the door.
    """
    from penstock.gateway import workers
    from penstock.gateway.app import create_app
    from penstock.http.serve import serve

    def started() -> None:
        settle()
        if alone:
            announce(config, sock, first_key)

    return await serve(
        create_app(door, config),
        config,
        worker or door,
        sock,
        name="gateway",
        on_started=started,
        handle_signals=alone,
        on_actions=None if alone else workers.obey,
        beside=beside(spec, config, door, admin),
    )


async def _serve(
    spec: Spec, config: HttpConfig, sock: socket.socket, admin: socket.socket | None, alone: bool
) -> int:
    from penstock.gateway.opening import open_door

    door, first_key = await open_door(spec, None)
    door.start()
    return await serve_door(spec, config, door, sock, admin, alone=alone, first_key=first_key)
