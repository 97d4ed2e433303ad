"""`penstock up penstock.yaml`: the engines that a spec has on this machine, and the gateway in front of them.

    spec ─▶ port bound ─▶ plan (flags, devices, memory: local_models) ─▶ engines start ─▶ gateway listens
         ─▶ its URL and, the first time, a key ─▶ SIGTERM: the gateway drains, then the engines

With `gateway.workers`, the gateway is so many processes, and the engines are another one's. What is wrong is
said before anything is started, or ends all that has been.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError
from penstock.observe import logs
from penstock.spec import Spec, load

from . import gateway

if TYPE_CHECKING:
    from penstock.gateway.local.control import Control
    from penstock.gateway.local.fleet import LocalFleet
    from penstock.http.config import HttpConfig

    from .local_models import LocalPlan

logger = logging.getLogger("penstock.up")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, and the flags of the gateway's listener."""
    gateway.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run until a signal. Returns 0 after a complete drain."""
    spec = load(Path(args.file))
    if not spec.models:
        raise StartupError(
            f"{args.file}: there is nothing under models: that could be started here.",
            advice="`penstock gateway` serves what is under upstreams:.",
        )
    config = gateway.http_config(spec, args)
    logs.configure("up", level=config.uvicorn_log_level, format=config.log_format)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from penstock.http.bind import bind

    from .api import loop_factory
    from .local_models import plan, warnings

    sock = bind(config)
    admin: socket.socket | None = None
    try:
        admin = gateway.bind_admin(spec, config)
        for warning in warnings(spec):
            logger.warning("%s", warning)
        key = secrets.token_urlsafe(32)
        planned = plan(spec, key)
        for table in planned.tables:
            print(table, file=sys.stderr, flush=True)
        if spec.gateway.workers > 1:
            return _several(spec, config, planned, key, sock, admin)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(spec, config, planned, key, sock, admin))
    finally:
        sock.close()
        if admin is not None:
            admin.close()


async def _serve(
    spec: Spec,
    config: HttpConfig,
    planned: LocalPlan,
    key: str,
    sock: socket.socket,
    admin: socket.socket | None,
) -> int:
    from penstock.gateway.local.household import Household
    from penstock.gateway.opening import open_door

    fleet = _fleet(spec, planned, key)
    control = await _control(fleet, _port(config, sock))
    try:
        door, first_key = await open_door(spec, fleet)
        fleet.start()
        door.start()
        status = await gateway.serve_door(
            spec,
            config,
            door,
            sock,
            admin,
            alone=True,
            worker=Household(door, fleet),
            first_key=first_key,
        )
        if fleet.refusal is not None:
            raise fleet.refusal
        return status
    finally:
        await control.close()
        await fleet.close()


def _several(
    spec: Spec,
    config: HttpConfig,
    planned: LocalPlan,
    key: str,
    sock: socket.socket,
    admin: socket.socket | None,
) -> int:
    """Several processes of the gateway, and one that has the engines (gateway/local/shared.py)."""
    from penstock.gateway import workers
    from penstock.http.bind import listen

    from .api import loop_factory

    first_key = workers.in_child(lambda: gateway.prepare(spec))
    listen(sock, config)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder, socket.socket(socket.AF_UNIX) as hall:
        path = f"{folder}/engines"  # a folder that nobody else may enter
        try:
            hall.bind(path)
        except OSError as error:
            raise StartupError(
                f"There can be no socket {path}: {error}.",
                advice="Set TMPDIR to a short path on a local disk.",
            ) from error
        hall.listen()

        port = _port(config, sock)

        def engines() -> int:
            for each in filter(None, (sock, admin)):
                each.close()
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(_engines(spec, planned, key, hall, port))

        def serve_one() -> int:
            hall.close()
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(_worker(spec, config, key, path, sock, admin))

        gateway.announce(config, sock, first_key)
        return workers.run(spec.gateway.workers, serve_one, engines)


async def _engines(spec: Spec, planned: LocalPlan, key: str, hall: socket.socket, port: int | None) -> int:
    """The process that has the engines: until a signal, or until a model cannot work as the spec has it."""
    from penstock.gateway import workers
    from penstock.gateway.local.shared import Hall

    fleet = _fleet(spec, planned, key)
    loop, over, patient = asyncio.get_running_loop(), asyncio.Event(), True

    def hurry() -> None:
        nonlocal patient
        patient = False
        over.set()
        if closing is not None:
            loop.create_task(fleet.close(patient=False))

    closing: asyncio.Task[None] | None = None
    control = await _control(fleet, port)
    loop.add_signal_handler(workers.STOP, over.set)
    loop.add_signal_handler(workers.HURRY, hurry)
    fleet.subscribe(lambda _: over.set() if fleet.refusal is not None else None)
    try:
        server = await asyncio.start_unix_server(Hall(fleet).serve, sock=hall)
        fleet.start()
        await over.wait()
        server.close()
    finally:
        await control.close()
        closing = loop.create_task(fleet.close(patient=patient))
        await closing
    if fleet.refusal is not None:
        logs.complain(f"penstock up: {fleet.refusal}")
        return 2
    return 0


async def _worker(
    spec: Spec, config: HttpConfig, key: str, path: str, sock: socket.socket, admin: socket.socket | None
) -> int:
    """One process of the gateway, which asks for engines at `path`."""
    from penstock.gateway.local.shared import SharedFleet
    from penstock.gateway.opening import open_door

    fleet = await SharedFleet.connect(path, key)
    try:
        door, _ = await open_door(spec, fleet)
        door.start()
        return await gateway.serve_door(spec, config, door, sock, admin, alone=False)
    finally:
        await fleet.close()


def _port(config: HttpConfig, sock: socket.socket) -> int | None:
    """Of the gateway; None for one that listens on a Unix socket."""
    return None if config.uds is not None else int(sock.getsockname()[1])


async def _control(fleet: LocalFleet, port: int | None) -> Control:
    """Where `penstock tune` finds the engines; without it, everything else works."""
    from penstock.gateway.local.control import Control, path_for

    control = Control(fleet)
    try:
        if port is not None:
            await control.listen(path_for(port))
    except StartupError as error:
        logger.warning("penstock tune will not be able to restart engines: %s", error)
    return control


def _fleet(spec: Spec, planned: LocalPlan, key: str) -> LocalFleet:
    from penstock.gateway.local.fleet import LocalFleet

    return LocalFleet(planned.parts, key=key, show=_show, environment=without_secrets(spec, os.environ))


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def without_secrets(spec: Spec, environment: Mapping[str, str]) -> dict[str, str]:
    """What engines get of the environment: not the keys of clouds, of the admin API and of the database."""
    secret = {upstream.api_key_env for upstream in spec.upstreams.values()}
    secret |= {spec.gateway.admin.key_env if spec.gateway.admin else None, "PENSTOCK_LEDGER_PASSWORD"}
    return {name: value for name, value in environment.items() if name not in secret}
