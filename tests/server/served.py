"""A server process with the fake engine: `python -m tests.server.served`. For tests of signals.

SIGUSR1 lets the paused engine go on, SIGUSR2 kills it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from functools import partial

from penstock.http.bind import bind
from penstock.http.serve import serve
from penstock.server.app import create_app
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate

from .fake_engine import FakeEngine
from .tiny import REPLY, make_tokenizer


class Announcing(FakeEngine):
    """Says when it drains."""

    async def drain(self, timeout: float) -> None:
        self.draining = True
        print("draining", flush=True)
        await super().drain(timeout)


def main() -> int:
    """Serve until told otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pause-at", type=int)
    parser.add_argument("--shutdown-timeout", type=float, default=30.0)
    options = parser.parse_args()
    logging.basicConfig()
    tokenizer = make_tokenizer()
    engine = Announcing(lambda _: tokenizer.encode(REPLY), pause_at=options.pause_at)
    config = ServerConfig(
        host="127.0.0.1",
        port=0,
        shutdown_timeout=options.shutdown_timeout,
        disable_uvicorn_access_log=True,  # standard output is the test's
    )
    app = create_app(engine, tokenizer, ChatTemplate.from_tokenizer(tokenizer), config)
    sock = bind(config)
    signal.signal(signal.SIGUSR1, lambda *_: engine.resume())
    signal.signal(signal.SIGUSR2, lambda *_: engine.die("CUDA error: an illegal memory access"))
    port = sock.getsockname()[1]
    listening = partial(print, "listening", port, flush=True)
    return asyncio.run(serve(app, config, engine, sock, name="engine", on_started=listening))


if __name__ == "__main__":
    raise SystemExit(main())
