"""Keys: made, looked up, rotated, revoked, over the command line; and what a flood of wrong ones costs."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock.cli.main import main
from penstock.core.errors import InvalidRequest, StartupError
from penstock.gateway.ledger.journal import Position
from penstock.gateway.ledger.keys import KeyCache, KeyNotFound, KeyStore, digest, new_secret, well_formed
from penstock.gateway.ledger.schema import keys
from penstock.gateway.ledger.store import Entry, Store, StoreDown
from penstock.gateway.ledger.thread import StoreThread
from penstock.gateway.opening import _first_key, open_door
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.records import Row
from penstock.spec import loads
from penstock.spec.model import Limits


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    found.open()
    return found


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def test_a_secret_is_long_random_and_checked() -> None:
    secret = new_secret()
    assert secret.startswith("sk-ps-")
    assert well_formed(secret)
    assert new_secret() != secret
    for index in range(6, len(secret)):
        other = "A" if secret[index] != "A" else "B"
        assert not well_formed(secret[:index] + other + secret[index + 1 :])
    assert not well_formed("")
    assert not well_formed(secret + "a")
    assert not well_formed("sk-ps-" + "ä" * 49)


def test_only_a_digest_is_stored(store: Store, tmp_path: Path) -> None:
    key, secret = KeyStore(store).create(name="n")
    store.close()
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
    with store.reading() as connection:
        assert connection.execute(sa.select(keys.c.digest)).scalar_one() == digest(secret)
    assert key.hint == secret[-4:]
    store.close()


def test_the_database_is_its_owners(tmp_path: Path) -> None:
    """Whatever the umask is, with what SQLite writes beside it; the mode of one that is there stays."""
    before = os.umask(0o000)
    try:
        store = Store(f"sqlite:///{tmp_path / 'new.db'}")
        store.open()
    finally:
        os.umask(before)
    KeyStore(store).create()
    with store.reading() as connection:
        connection.execute(sa.select(keys.c.id)).all()
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    store.close()
    assert modes == {"new.db": 0o600, "new.db-wal": 0o600, "new.db-shm": 0o600}
    (tmp_path / "new.db").chmod(0o640)
    store.open()
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o640
    store.close()
    with pytest.raises(StartupError, match="cannot be made"):
        Store(f"sqlite:///{tmp_path / ('x' * 300)}").open()


def test_the_cache_knows_a_key_and_forgets_it_when_it_is_revoked(store: Store) -> None:
    async def body() -> None:
        table = KeyStore(store)
        thread = StoreThread()
        cache = KeyCache(table, thread)
        cache.version(store.beat("w").keys)
        limits = Limits.model_validate({"dollars_per_day": 5})
        key, secret = table.create(name="n", team="t", tags={"feature": "x"}, routes=["chat"], limits=limits)
        assert await cache.principal(new_secret()) is None
        found = await cache.principal(secret)
        assert found is not None
        assert (found.key_id, found.team, found.tags, found.routes) == (
            key.id,
            "t",
            {"feature": "x"},
            ("chat",),
        )
        assert found.service_class == "realtime"
        table.update(key.id, {"service_class": "background"})
        cache.version(store.beat("w").keys)
        changed = await cache.principal(secret)
        assert changed is not None
        assert changed.service_class == "background"
        assert found.limits is not None
        assert found.limits.dollars_per_day == 5 * NANO
        table.revoke(key.id)
        cache.version(store.beat("w").keys)
        assert await cache.principal(secret) is None
        thread.close()

    run(body)
    store.close()


def test_rotation_leaves_the_old_secret_for_a_while(store: Store) -> None:
    async def body() -> None:
        now = [1_800_000_000.0]
        table = KeyStore(store, clock=lambda: now[0])
        thread = StoreThread()
        cache = KeyCache(table, thread, clock=lambda: now[0])
        key, first = table.create()
        _, second = table.rotate(key.id, grace=10)
        for secret in (first, second):
            assert (await cache.principal(secret)).key_id == key.id  # type: ignore[union-attr]
        now[0] += 11
        assert await cache.principal(first) is None
        assert await cache.principal(second) is not None
        table.rotate(key.id)
        cache.version(store.beat("w").keys)
        assert await cache.principal(second) is None
        table.revoke(key.id)
        with pytest.raises(InvalidRequest, match="is revoked"):
            table.rotate(key.id)
        with pytest.raises(KeyNotFound, match="no key 'nope'"):
            table.revoke("nope")
        thread.close()

    run(body)
    store.close()


def test_keys_expire(store: Store) -> None:
    async def body() -> None:
        now = [1_800_000_000.0]
        table = KeyStore(store, clock=lambda: now[0])
        thread = StoreThread()
        cache = KeyCache(table, thread, clock=lambda: now[0])
        _, secret = table.create(expires=1_800_000_005 * NANO)
        assert await cache.principal(secret) is not None
        now[0] += 5
        assert await cache.principal(secret) is None
        cache.version(99)
        assert await cache.principal(secret) is None  # from the table as from memory
        thread.close()

    run(body)
    store.close()


def test_a_flood_of_wrong_keys_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        table = KeyStore(store)
        thread = StoreThread()
        cache = KeyCache(table, thread, unknown=50)
        looked = 0
        find = table.find

        def counted(key: bytes) -> object:
            nonlocal looked
            looked += 1
            return find(key)

        monkeypatch.setattr(table, "find", counted)
        assert (
            await asyncio.gather(*(cache.principal(f"sk-ps-{index:049}") for index in range(500)))
            == [None] * 500
        )
        assert looked == 0  # made up without a checksum
        same = new_secret()
        await asyncio.gather(*(cache.principal(same) for _ in range(100)))
        assert looked == 1
        for _ in range(80):
            assert await cache.principal(new_secret()) is None
        assert len(cache._unknown) == 50
        thread.close()

    run(body)
    store.close()


def test_known_keys_outlive_an_outage_for_a_minute(store: Store) -> None:
    async def body() -> None:
        now = [0.0]
        table = KeyStore(store)
        thread = StoreThread()
        cache = KeyCache(table, thread, monotonic=lambda: now[0])
        _, secret = table.create()
        cache.version(1)
        assert await cache.principal(secret) is not None
        now[0] = 59
        assert await cache.principal(secret) is not None
        now[0] = 61
        with pytest.raises(StoreDown):
            await cache.principal(secret)
        thread.close()

    run(body)
    store.close()


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_keys_over_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    where = ("--ledger", url)
    given = ("--team", "t", "--tag", "feature=x", "--expires", "30d", "--dollars-per-day", "2.5")
    status, out, err = command(capsys, "keys", "create", "alice", *given, *where)
    assert status == 0
    assert well_formed(out.strip())
    assert "shown this once" in err
    status, out, _ = command(capsys, "keys", "list", "--json", *where)
    [key] = json.loads(out)
    assert (key["name"], key["state"], key["limits"]) == (
        "alice",
        "active",
        {"dollars_per_day": 2_500_000_000},
    )
    assert "digest" not in key
    changes = (
        "--service-class",
        "background",
        "--team",
        "u",
        "--requests-per-minute",
        "7",
        "--unset",
        "expires",
        "--name",
        "bob",
    )
    status, out, err = command(capsys, "keys", "update", key["id"], *changes, *where)
    assert (status, out) == (0, "")
    assert "is changed: expires, limits, name, service_class, team." in err
    _, out, _ = command(capsys, "keys", "list", "--json", *where)
    wanted = {
        "service_class": "background",
        "name": "bob",
        "team": "u",
        "limits": {"requests_per_minute": 7},
        "expires": None,
    }
    assert json.loads(out) == [{**key, **wanted}]
    status, out, _ = command(capsys, "keys", "rotate", key["id"], "--grace", "1h", *where)
    assert well_formed(out.strip())
    assert command(capsys, "keys", "revoke", key["id"], *where)[0] == 0
    assert "revoked" in command(capsys, "keys", "list", *where)[1]
    for words, what in (
        (("revoke", "nope"), "There is no key 'nope'"),
        (("create", "--tag", "feature"), "is not TAG=VALUE"),
        (("create", "--dollars-per-day", "many"), "--dollars-per-day many"),
        (("create", "--expires", "soon"), "no duration"),
        (("create", "--tag", "a=b", "--tag", "a=c"), "stands twice"),
        (("update", key["id"]), "Nothing is to be changed"),
        (("update", "nope", "--name", "x"), "There is no key 'nope'"),
        (("update", key["id"], "--name", "x"), "is revoked"),
        (("rotate", key["id"]), "is revoked"),
    ):
        status, _, err = command(capsys, "keys", *words, *where)
        assert status == 2
        assert what in err
    status, _, err = command(capsys, "keys", "list", "--ledger", f"sqlite:///{tmp_path / 'other.db'}")
    assert status == 2
    assert "There is no ledger" in err


def test_a_key_is_of_a_team_and_for_routes_of_the_spec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the spec is known; who names a ledger knows what he does."""
    spec = tmp_path / "penstock.yaml"
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    spec.write_text(f"teams: {{search: {{}}}}\nledger: {{url: '{url}'}}\n")
    for words, what in (
        (("create", "--team", "serch"), "There is no team 'serch' in the spec. Did you mean search?"),
        (("create", "--route", "small"), "There is no route 'small' in the spec."),
        (("update", "key_1", "--team", "serch"), "Did you mean search?"),
    ):
        status, _, err = command(capsys, "keys", *words, "--spec", str(spec))
        assert status == 2
        assert what in err
    assert not (tmp_path / "ledger.db").exists()
    for given in (("--team", "search", "--spec", str(spec)), ("--team", "serch", "--ledger", url)):
        assert command(capsys, "keys", "create", *given)[0] == 0


def test_the_ledger_over_the_command_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time_ns()
    rows = [
        Row(
            id=f"r{index}",
            at=now - index * 3600 * NANO,
            key_id="key_1",
            key_name="=cmd|'x'",
            team="t",
            tags={"feature": "search" if index % 2 else "chat", "env": "prod"},
            upstream="demo",
            model="demo",
            status=200,
            settlement="settled",
            input_tokens=10,
            output_tokens=index,
            device_seconds=1_500_000_001,
            dollars=123,
            note="\x1b[31m",
        )
        for index in range(5)
    ]
    store.register("w")
    store.apply("w", [Entry(n, row, {}) for n, row in enumerate(rows)], Position(), Position(0, 1))
    store.close()
    where = ("--ledger", f"sqlite:///{tmp_path / 'ledger.db'}")
    status, out, _ = command(capsys, "ledger", "export", "--tag", "feature=search", "--since", "150m", *where)
    assert status == 0
    [found] = csv.DictReader(io.StringIO(out))
    assert (found["id"], found["feature"], found["inference.backend"]) == ("r1", "search", "demo")
    assert (found["gpu_seconds"], found["dollars"]) == ("1.500000001", "0.000000123")
    assert (found["input_tokens"], found["output_tokens"], found["model"]) == ("10", "1", "demo")
    assert found["key"] == "'=cmd|'x'"  # a spreadsheet must not run it
    _, out, _ = command(capsys, "ledger", "export", "--format", "json", "--tag", "env=prod", *where)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["r4", "r3", "r2", "r1", "r0"]
    _, out, _ = command(capsys, "ledger", "list", "--limit", "2", "--json", "--key", "key_1", *where)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["r0", "r1"]
    assert "settled" in command(capsys, "ledger", "list", "--team", "t", *where)[1]
    status, out, _ = command(capsys, "ledger", "show", "r3", *where)
    assert "\x1b" not in out
    assert "1.500000001" in out
    assert command(capsys, "ledger", "show", "r9", *where)[0] == 1
    status, _, err = command(capsys, "ledger", "list", "--since", "once", *where)
    assert status == 2
    assert "--since once is no time" in err


@pytest.mark.parametrize("wanted", [True, False])
def test_a_first_key_is_made_unless_the_spec_says_otherwise(tmp_path: Path, wanted: bool) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    text = f"""
gateway: {{first_key: {str(wanted).lower()}}}
ledger: {{url: "{url}", spool: "{tmp_path}/spool"}}
"""

    async def opened() -> str | None:
        door, secret = await open_door(loads(text), None)
        await door.close()
        return secret

    secret = asyncio.run(opened())
    store = Store(url)
    try:
        assert (secret is not None) == wanted
        assert len(KeyStore(store).list()) == wanted
    finally:
        store.close()


def test_gateways_that_start_together_make_one_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen a ledger without keys before one of them makes one, as two pods of a Deployment may."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    found: list[str | None] = []

    def nothing(self: KeyStore) -> list[Any]:
        monkeypatch.setattr(KeyStore, "list", real)
        second = Store(url)
        try:
            second.open()
            found.append(_first_key(second, KeyStore(second)))
        finally:
            second.close()
        return []

    real, first = KeyStore.list, Store(url)
    try:
        first.open()
        monkeypatch.setattr(KeyStore, "list", nothing)
        found.append(_first_key(first, KeyStore(first)))
        assert sum(each is not None for each in found) == 1
        assert len(KeyStore(first).list()) == 1
    finally:
        first.close()
