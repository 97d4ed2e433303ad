"""A real `penstock gateway` in a process of its own, and the workers below it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from penstock.gateway.ledger.keys import KeyStore
from penstock.gateway.ledger.schema import accounts, ledger
from penstock.gateway.ledger.store import Store
from penstock.spec.model import Limits
from tests.http.live import PATIENCE, Response, exchange


class Process:
    """The gateway of a spec, in a folder; its ledger is `penstock.db` there unless `url` says otherwise."""

    def __init__(
        self,
        folder: Path,
        spec: str,
        *flags: str,
        url: str | None = None,
        environment: dict[str, str] | None = None,
        says: int = 2,
    ) -> None:
        """`says`: lines that it begins with: its address, and the first key unless its ledger has one."""
        (folder / "penstock.yaml").write_text(spec)
        self.folder = folder
        self.database = url or f"sqlite:///{folder / 'penstock.db'}"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "gateway", *flags],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        said = [self.process.stdout.readline().split() for _ in range(says)]  # and it says no more
        if not all(said):
            self.close()
            raise AssertionError(self.log)
        self.url = said[0][-1]
        self.key = said[1][-1] if says > 1 else ""
        self.port = int(self.url.removesuffix("/v1").rpartition(":")[2])

    @property
    def log(self) -> str:
        """Everything that was logged so far."""
        return self._log.read_text()

    def new_key(self, limits: dict[str, Any] | None = None, **fields: Any) -> tuple[str, str]:
        """Another key, by the store: its id and its secret."""
        store = Store(self.database)
        try:
            made = None if limits is None else Limits.model_validate(limits)
            key, secret = KeyStore(store).create(limits=made, **fields)
        finally:
            store.close()
        return key.id, secret

    def post(self, path: str, body: Any, key: str | None = None, **headers: str) -> Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return exchange(
            self.port, "POST", path, body, {"Authorization": f"Bearer {key or self.key}", **given}
        )

    @property
    def workers(self) -> dict[int, str]:
        """Processes that serve → the names of their journals."""
        found = {}
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in map(int, listed) if listed else [self.process.pid]:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = Path(os.readlink(fd))
                    if target.suffix == ".lock" and target.parent.name.endswith("spool"):
                        found[pid] = target.stem
        return found

    def who_has(self, id: str) -> int:
        """The worker whose journal has this request."""
        for pid, name in self.workers.items():
            for path in self.folder.glob(f"*spool/{name}.*.journal"):
                if id.encode() in path.read_bytes():
                    return pid
        raise LookupError(id)

    def rows(self) -> list[dict[str, Any]]:
        """The ledger."""
        store = Store(self.database)
        try:
            with store.reading() as connection:
                found = connection.execute(sa.select(ledger).order_by(ledger.c.at)).mappings()
                return [dict(row) for row in found]
        finally:
            store.close()

    def charged(self) -> dict[str, int]:
        """Account → what was charged to it for good."""
        store = Store(self.database)
        try:
            with store.reading() as connection:
                return dict(connection.execute(sa.select(accounts.c.id, accounts.c.used)).all())
        finally:
            store.close()

    def stop(self) -> None:
        """A gentle end, after which every row is written; fails where it is not one."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(PATIENCE) == 0, self.log

    def close(self) -> None:
        """Its end."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def gateway(folder: Path, spec: str, *flags: str, **more: Any) -> Iterator[Process]:
    """One for the length of a with block."""
    process = Process(folder, spec, *flags, **more)
    try:
        yield process
    finally:
        process.close()
