"""One replica started again with other flags, and always with the spec's in the end."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.gateway.local import control, restart
from penstock.gateway.local.control import Control, Held, folder, path_for

from .test_fleet import World, run, world


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart.Backoff.__init__, "__defaults__", (0.02, 0.05, 60.0, 0))


@asynccontextmanager
async def controlled(root: Path, **models: dict[str, Any]) -> AsyncIterator[tuple[World, Path]]:
    async with world(root, **models) as here:
        here.fleet.start()
        path = root / "control.sock"
        served = Control(here.fleet)
        await served.listen(path)
        try:
            yield here, path
        finally:
            await served.close()


def flags(here: World, name: str = "demo/0") -> list[str]:
    """What each start of a replica had after its port."""
    lines = (here.folder(name) / "arguments").read_text().splitlines()
    return [" ".join(line.split()[2:]) for line in lines]


def test_other_flags_and_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with controlled(tmp_path, demo={"slo": {"ttft_p95": "300ms"}}) as (here, path):
            held = await Held.take(path, "demo", 0)
            assert held.told["url"] == here.state().url
            assert held.told["key"] == "sk-engine"
            assert held.told["slo"] == {"ttft_p95": 0.3}
            assert await held.restart({"max-num-seqs": 32}) > 0
            assert here.state().state == "ready"
            await held.restart({"max-num-seqs": 8, "max-num-batched-tokens": 64})
            held.close()
            await here.until(lambda: len(flags(here)) == 4 and here.state().state == "ready")
            first = "--max-num-seqs=32"
            assert flags(here) == ["", first, "--max-num-seqs=8 --max-num-batched-tokens=64", ""]

    run(go)


def test_whoever_goes_in_the_middle_of_a_restart_leaves_the_specs_flags(tmp_path: Path) -> None:
    async def go() -> None:
        async with controlled(tmp_path) as (here, path):
            held = await Held.take(path, "demo", 0)
            (here.folder() / "unready").touch()  # it will never be ready
            waiting = asyncio.create_task(held.restart({"max-num-seqs": 32}))
            await here.until(lambda: len(flags(here)) == 2)
            waiting.cancel()
            held.close()
            (here.folder() / "unready").unlink()
            await here.until(lambda: len(flags(here)) >= 3 and here.state().state == "ready")
            assert flags(here)[-1] == ""
            again = await Held.take(path, "demo", 0)  # it is nobody's now
            again.close()

    run(go)


def test_flags_that_it_does_not_start_with_are_an_error_and_not_the_end_of_up(tmp_path: Path) -> None:
    async def go() -> None:
        async with controlled(tmp_path) as (here, path):
            held = await Held.take(path, "demo", 0)
            (here.folder() / "refuse").write_text("error: too many sequences")
            with pytest.raises(StartupError, match="too many sequences"):
                await held.restart({"max-num-seqs": 1024})
            assert here.fleet.refusal is None
            (here.folder() / "refuse").unlink()
            await held.restart({"max-num-seqs": 2})
            assert here.state().state == "ready"
            held.close()

    run(go)


def test_kept_flags_outlive_the_connection(tmp_path: Path) -> None:
    async def go() -> None:
        async with controlled(tmp_path) as (here, path):
            held = await Held.take(path, "demo", 0)
            await held.restart({"max-num-seqs": 16})
            await held.keep()
            held.close()
            again = await Held.take(path, "demo", 0)
            assert again.told["flags"] == {"max-num-seqs": 16}
            assert flags(here) == ["", "--max-num-seqs=16"]
            await again.restart({})
            again.close()
            other = await Held.take(path, "demo", 0)
            assert other.told["flags"] == {}
            other.close()
            assert flags(here) == ["", "--max-num-seqs=16", ""]

    run(go)


def test_what_is_refused(tmp_path: Path) -> None:
    async def go() -> None:
        async with controlled(tmp_path, demo={"replicas": 2}) as (here, path):
            with pytest.raises(StartupError, match=r"no model other here\. Use --model with one of: demo"):
                await Held.take(path, "other", 0)
            with pytest.raises(StartupError, match="no replica 2; it has 2"):
                await Held.take(path, "demo", 2)
            held = await Held.take(path, "demo", 0)
            with pytest.raises(StartupError, match="Somebody tunes demo/0 already"):
                await Held.take(path, "demo", 0)
            other = await Held.take(path, "demo", 1)
            other.close()
            for bad in (
                {"trust-remote-code": 1},
                {"max-num-seqs": 0},
                {"max-num-seqs": True},
                {"max-num-seqs": "1 --host=0.0.0.0"},
                {"max-num-seqs": 1 << 40},
            ):
                with pytest.raises(StartupError, match="cannot be set to"):
                    await held.restart(bad)  # type: ignore[arg-type]
            assert len(here.starts()) == 1
            held.close()

    run(go)


@pytest.mark.parametrize(
    "said",
    [b"\xff\xfe\n", b"[]\n", b'{"flags": {"max-num-seqs": 3}}\n', b'{"hold": 3}\n', b"[" * 200_000 + b"\n"],
)
def test_whatever_is_said_to_it_is_answered_or_the_end(tmp_path: Path, said: bytes) -> None:
    async def go() -> None:
        async with controlled(tmp_path) as (here, path):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(said)
            line = await reader.readline()
            assert line == b"" or b'"error"' in line
            writer.close()
            await here.fleet.ready("demo", timeout=20)
            assert len(here.starts()) == 1

    run(go)


def test_the_socket_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert path_for(8080) == tmp_path / "penstock" / "up-8080.sock"
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700
    (tmp_path / "penstock").chmod(0o755)
    with pytest.raises(StartupError, match="not a folder of this user alone"):
        folder()
    (tmp_path / "penstock").rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "penstock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartupError, match="not a folder of this user alone"):
        folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(control.tempfile, "gettempdir", lambda: str(tmp_path))
    assert folder().parent == tmp_path
