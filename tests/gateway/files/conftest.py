"""A gateway with a real ledger in SQLite, in front of an upstream with files."""

from __future__ import annotations

import asyncio
import json
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
import sqlalchemy as sa
from starlette.types import Receive, Scope, Send

from penstock.gateway.app import create_app
from penstock.gateway.door import Door
from penstock.gateway.files import settling
from penstock.gateway.ledger.keys import KeyStore
from penstock.gateway.ledger.schema import accounts, ledger
from penstock.gateway.ledger.store import Store
from penstock.gateway.opening import open_door
from penstock.http.config import HttpConfig
from penstock.spec.load import loads
from penstock.spec.model import Spec
from tests.http.live import PATIENCE, Live, Response, exchange

from .cloud import Cloud

T = TypeVar("T")
CHAT = "/v1/chat/completions"
SPEC = """
upstreams:
  cloud:
    url: {url}/v1
    {urls}
    kind: openai
    files: true
    timeout_connect: 10
    timeout_headers: 20
    timeout_idle: 20
    models:
      tiny:
        name: tiny-1
        context: 4096
        price: {{input: 1, output: 2, batch: 0.5, as_of: 2026-01-01, source: a test}}
routes:
  small:
    targets: [{{model: tiny, upstream: cloud}}]
    aliases: [classify]
    max_tokens: {{ceiling: 100, default: 50}}
  other:
    targets: [{{model: tiny, upstream: cloud}}]
teams:
  narrow: {{routes: [other]}}
limits:
  tokens_per_minute: 10
  dollars_per_day: 1
  concurrent_requests: 4
gateway:
  files: {{max_bytes: 100000, max_line_bytes: 2000, max_lines: 20}}
"""


class Late:
    """An application that is made later."""

    app: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class LiveLedger(Live):
    """A gateway whose door is opened in its own loop."""

    def __init__(self, spec: Spec, **config: Any) -> None:
        self._late = Late()
        self._spec = spec
        self._config = HttpConfig(host="127.0.0.1", port=0, **config)
        super().__init__(self._late, self._config)
        self.door: Door
        self.loop: asyncio.AbstractEventLoop
        self.opened = threading.Event()

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            self.door, _ = await open_door(self._spec, None)
            self._late.app = create_app(self.door, self._config)
            self.opened.set()
            await self._server.serve(sockets=[self._socket])
            await self.door.close()
            await asyncio.sleep(0)

        asyncio.run(serve())


class Gateway:
    """One, with its ledger."""

    def __init__(self, spec: str, folder: Path, clouds: list[Cloud]) -> None:
        self.folder = folder
        self.clouds = clouds
        self.cloud = clouds[0]
        text = textwrap.dedent(spec) + textwrap.dedent(
            f"""
            ledger:
              url: sqlite:///{folder}/ledger.db
              spool: {folder}/spool
            """
        )
        self.spec = loads(text)
        self.store = Store(self.spec.ledger.url)
        self.store.open()
        keys = KeyStore(self.store)
        self.key = keys.create(name="ours")[1]
        self.stranger = keys.create(name="stranger")[1]
        self.narrow = keys.create(name="narrow", team="narrow")[1]
        self.live = LiveLedger(self.spec)

    def start(self) -> Gateway:
        self.live.start()
        assert self.live.opened.wait(PATIENCE)
        return self

    def stop(self) -> None:
        self.live.stop()
        self.store.close()

    def again(self) -> None:
        """The gateway ends, and another one begins."""
        self.live.stop()
        self.live = LiveLedger(self.spec)
        self.start()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.live.loop).result(PATIENCE)

    def flush(self) -> None:
        """All rows are in the database."""
        self.do(self.live.door.meter.flush())  # type: ignore[attr-defined]

    def look(self) -> None:
        """Ask about all batches now."""
        self.flush()
        assert self.live.door.files is not None
        self.do(self.live.door.files.settling.look())

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.live.url}/v1", api_key=key or self.key, max_retries=0, timeout=PATIENCE
        )

    def call(self, method: str, path: str, body: Any = None, key: str | None = None, **more: str) -> Response:
        headers = {"Authorization": f"Bearer {key or self.key}", **more}
        return exchange(self.live.port, method, path, body, headers)

    def upload(
        self,
        content: bytes,
        purpose: str = "batch",
        *,
        filename: str = "in.jsonl",
        key: str | None = None,
        **fields: str,
    ) -> Response:
        """A form, written by hand."""
        return self.form(form(content, filename, purpose=purpose, **fields), key=key)

    def form(
        self, body: bytes, kind: str = "multipart/form-data; boundary=b", key: str | None = None
    ) -> Response:
        return self.call("POST", "/v1/files", body, key, **{"Content-Type": kind})

    def batch(self, file: str, key: str | None = None, **more: Any) -> Response:
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **more}
        return self.call("POST", "/v1/batches", body, key)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until something is so, in another thread."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    def rows(self) -> list[dict[str, Any]]:
        """All of the ledger, in their order."""
        self.flush()
        with self.store.reading() as connection:
            return [
                dict(each) for each in connection.execute(sa.select(ledger).order_by(ledger.c.at)).mappings()
            ]

    def row(self) -> dict[str, Any]:
        (row,) = self.rows()
        return row

    def used(self, unit: str = "dollars") -> int:
        """What the accounts of a unit's day hold; checks that it is the sum of what rows were charged."""
        rows = self.rows()
        with self.store.reading() as connection:
            found = connection.execute(
                sa.select(accounts.c.id, accounts.c.used).where(accounts.c.unit == unit)
            )
            used = {id: amount for id, amount in found if "|day|" in id}
        for id, amount in used.items():
            assert amount == sum(row["charged"].get(id, 0) for row in rows), id
        return sum(used.values())


def form(content: bytes, filename: str = "in.jsonl", **fields: str) -> bytes:
    """multipart/form-data with the boundary `b`."""
    out = b""
    for name, value in fields.items():
        out += f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    disposition = f'Content-Disposition: form-data; name="file"; filename="{filename}"'.encode()
    return (
        out + b"--b\r\n" + disposition + b"\r\nContent-Type: text/html\r\n\r\n" + content + b"\r\n--b--\r\n"
    )


def line(number: int = 1, model: str = "small", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": f"Hi {number}!"}], **more}
    return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}


def lines(*each: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in each)


Make = Callable[..., Gateway]


@pytest.fixture(scope="session")
def ledger_with_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that need not be migrated."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    store = Store(f"sqlite:///{path}")
    store.open()
    store.close()
    return path


@pytest.fixture
def make(tmp_path: Path, ledger_with_tables: Path) -> Iterator[Make]:
    """Start gateways: `make(clouds=1, replace={old: new})`."""
    shutil.copy(ledger_with_tables, tmp_path)
    started: list[Gateway] = []

    def start(clouds: int = 1, replace: dict[str, str] | None = None, spec: str = SPEC) -> Gateway:
        upstreams = [Cloud() for _ in range(clouds)]
        more = json.dumps([f"{each.url}/v1" for each in upstreams[1:]])
        text = spec.format(url=upstreams[0].url, urls=f"urls: {more}" if clouds > 1 else "")
        for old, new in (replace or {}).items():
            assert old in text
            text = text.replace(old, new)
        gateway = Gateway(text, tmp_path, upstreams)
        started.append(gateway)
        return gateway.start()

    yield start
    for gateway in started:
        gateway.stop()
        for cloud in gateway.clouds:
            cloud.upstream.stop()


@pytest.fixture
def gateway(make: Make) -> Gateway:
    """One in front of a cloud that works."""
    return make()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are due as soon as they are there."""
    monkeypatch.setattr(settling.Settling, "interval", 0.0)
    monkeypatch.setattr(settling, "_GRACE", 0.0)
