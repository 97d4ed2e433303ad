"""The admin API, over HTTP, on a gateway with a real ledger."""

from __future__ import annotations

import asyncio
import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.gateway.admin import admin_secret
from penstock.gateway.app import create_admin_app, create_app
from penstock.gateway.ledger import report
from penstock.gateway.ledger.journal import Position
from penstock.gateway.ledger.keys import KeyNotFound, KeyStore
from penstock.gateway.ledger.store import Entry, Store
from penstock.gateway.opening import open_door
from penstock.gateway.policy.amounts import NANO, Limit
from penstock.gateway.policy.leases import Ask
from penstock.gateway.records import Row
from penstock.http.bind import bind
from penstock.http.config import HttpConfig
from penstock.http.serve import Server
from penstock.spec.load import SpecError, loads
from tests.http.live import PATIENCE, Response, exchange

from .conftest import BODY, CHAT
from .stores import postgres
from .upstream import Upstream

SECRET = "admin-0123456789abcdef"
SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours: {{url: "{url}", kind: openai, pool: box, models: {{tiny: {{context: 4096}}}}}}
routes: {{small: {{targets: [{{model: tiny, upstream: ours}}]}}}}
teams:
  search:
    limits: {{dollars_per_month: 50, requests_per_minute: 100}}
    key_limits: {{dollars_per_day: 5}}
tags: {{feature: {{chat: {{limits: {{gpu_hours_per_day: 2}}}}}}}}
gateway: {{port: 0, admin: {{key_env: ADMIN_KEY{own}}}}}
ledger: {{url: "sqlite:///{folder}/penstock.db", spool: "{folder}/spool"}}
"""


class Governed:
    """A gateway as `penstock gateway` opens it, in a thread."""

    def __init__(self, spec: str) -> None:
        self._spec = loads(spec)
        self.ports: list[int] = []
        self.key: str | None = None
        self._ready = threading.Event()
        self._stop = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    def stop(self) -> None:
        self._stop()
        self._thread.join(PATIENCE)

    async def _run(self) -> None:
        door, self.key = await open_door(self._spec, None)
        door.start()
        config = HttpConfig(host="127.0.0.1", port=0)
        servers = []
        for app in (create_app(door, config), create_admin_app(door, config)):
            sock = bind(config)
            sock.listen()
            self.ports.append(sock.getsockname()[1])
            servers.append((Server(app, config), sock))

        def stop() -> None:
            for server, _ in servers:
                server.should_exit = True

        self._stop = stop
        self._ready.set()
        await asyncio.gather(*(server.serve(sockets=[sock]) for server, sock in servers))
        await door.close()

    def ask(
        self, method: str, path: str, body: Any = None, key: str | None = SECRET, port: int = 0
    ) -> Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return exchange(self.ports[port], method, f"/admin/v1{path}", body, headers)

    def made(self, **wanted: Any) -> dict[str, Any]:
        """A new key."""
        answer = self.ask("POST", "/keys", wanted)
        assert answer.status == 200, answer.body
        assert answer.headers["cache-control"] == "no-store"
        made: dict[str, Any] = answer.json
        return made

    def chat(self, key: str) -> Response:
        return exchange(self.ports[0], "POST", CHAT, BODY, {"Authorization": f"Bearer {key}"})


Open = Callable[..., Governed]


@pytest.fixture
def open_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setenv("ADMIN_KEY", SECRET)
    upstream = Upstream().start()
    opened: list[Governed] = []

    def start(own: str = "") -> Governed:
        opened.append(Governed(SPEC.format(url=upstream.url, folder=tmp_path, own=own)))
        return opened[-1]

    yield start
    for each in opened:
        each.stop()
    upstream.stop()


@pytest.fixture
def gateway(open_gateway: Open) -> Governed:
    return open_gateway()


def test_a_key_from_its_making_to_its_end(gateway: Governed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock.gateway")
    limits = {"dollars_per_day": "2.50", "requests_per_minute": 60}
    made = gateway.made(
        name="al\"ice's",
        team="search",
        tags={"feature": "chat"},
        routes=["small"],
        expires="90d",
        limits=limits,
    )
    secret = made.pop("value")
    assert secret.startswith("sk-ps-")
    assert made["redacted_value"] == f"sk-ps-…{secret[-4:]}"
    assert made["limits"] == {"dollars_per_day": 2.5, "requests_per_minute": 60}
    assert made["expires_at"] - made["created_at"] == 90 * 86_400
    assert (made["state"], made["object"], made["local_only"]) == ("active", "key", False)
    assert gateway.ask("GET", f"/keys/{made['id']}").json == made
    listed = gateway.ask("GET", "/keys?team=search").json
    assert listed == {"object": "list", "data": [made], "has_more": False, "last_id": None}
    assert gateway.chat(secret).status == 200

    rotated = gateway.ask("POST", f"/keys/{made['id']}/rotate", {"grace": "1h"}).json
    assert rotated["value"] != secret
    assert [gateway.chat(each).status for each in (secret, rotated["value"])] == [200, 200]
    again = gateway.ask("POST", f"/keys/{made['id']}/rotate").json
    until(lambda: gateway.chat(rotated["value"]).status == 401)
    assert gateway.chat(again["value"]).status == 200

    revoked = gateway.ask("POST", f"/keys/{made['id']}/revoke").json
    assert (revoked["state"], "value" in revoked) == ("revoked", False)
    until(lambda: gateway.chat(again["value"]).status == 401)
    assert gateway.ask("POST", f"/keys/{made['id']}/revoke", {}).json == revoked
    refused = gateway.ask("POST", f"/keys/{made['id']}/rotate", {})
    assert (refused.status, refused.reason) == (409, "key_revoked")
    told = [each.getMessage() for each in caplog.records if "admin:" in each.getMessage()]
    assert [each.split(" was ")[1] for each in told] == [
        f"{what}, from 127.0.0.1" for what in ("made", "rotated", "rotated", "revoked", "revoked")
    ]
    assert not any(value in caplog.text for value in (secret, rotated["value"], again["value"], SECRET))


def test_a_key_is_changed(gateway: Governed) -> None:
    """What is given, and nothing else; limits hold for the very next requests, with what was used before."""
    made = gateway.made(name="a", team="search", tags={"feature": "chat"}, limits={"requests_per_minute": 60})
    secret = made.pop("value")
    path = f"/keys/{made['id']}"
    assert gateway.chat(secret).status == 200
    changed = gateway.ask("POST", path, {"limits": {"requests_per_minute": 1}})
    assert changed.json == {**made, "limits": {"requests_per_minute": 1}}

    def limited() -> bool:
        answer = gateway.chat(secret)
        return answer.status == 429 and "1 requests per minute" in answer.error["message"]

    until(limited)
    gone: dict[str, Any] = {
        "limits": None,
        "team": "",
        "tags": {},
        "routes": ["small"],
        "expires": "1d",
        "name": "b",
    }
    gone["service_class"] = "background"
    changed = gateway.ask("POST", path, gone)
    del gone["expires"]
    assert changed.json == {**made, **gone, "expires_at": changed.json["expires_at"]}
    assert abs(changed.json["expires_at"] - time.time() - 86_400) < 60
    until(lambda: gateway.chat(secret).status == 200)
    assert gateway.ask("POST", path, {"expires": None}).json["expires_at"] is None
    assert gateway.ask("GET", path).json["team"] == ""

    for body, param, words in (
        ({}, None, "Nothing is to be changed"),
        ({"routes": ["smal"]}, "routes.0", "Did you mean small?"),
        ({"limits": {"dollar_per_day": 1}}, "limits.dollar_per_day", "Did you mean dollars_per_day?"),
        ({"value": "sk-mine"}, "value", "unknown key"),
        ({"team": "serch"}, "team", "Did you mean search?"),
        ({"expires": "2020-01-01"}, "expires", "not in the future"),
    ):
        answer = gateway.ask("POST", path, body)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert words in answer.error["message"]
    assert gateway.ask("POST", "/keys/key_unknown", {"name": "x"}).status == 404
    gateway.ask("POST", f"{path}/revoke")
    assert gateway.ask("POST", path, {"name": "x"}).reason == "key_revoked"


def test_a_key_of_a_team_that_the_spec_does_not_have(
    open_gateway: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The team was taken out of the spec, or has a typing error: it may do nothing, and the start says so."""
    store = Store(f"sqlite:///{tmp_path / 'penstock.db'}")
    store.open()
    table = KeyStore(store)
    key, secret = table.create(team="serch")
    table.revoke(table.create(team="gone")[0].id)
    table.create(team="past", expires=1)
    store.close()
    gateway = open_gateway()
    answer = gateway.chat(secret)
    assert (answer.status, answer.reason) == (403, "unknown_team")
    assert "'serch' of this key is not in the gateway's spec" in answer.error["message"]
    models = exchange(gateway.ports[0], "GET", "/v1/models", None, {"Authorization": f"Bearer {secret}"})
    assert models.status == 403
    warned = [each.getMessage() for each in caplog.records if "unknown_team" in each.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("1 key is of the team 'serch'")
    assert warned[0].endswith("Did you mean search?")
    assert gateway.ask("POST", f"/keys/{key.id}", {"team": "search"}).status == 200
    until(lambda: gateway.chat(secret).status == 200)


def test_an_empty_body_is_none_whatever_it_is_called(gateway: Governed) -> None:
    """Clients' libraries declare what they do not send."""
    path = f"/admin/v1/keys/{gateway.made()['id']}/rotate"

    def status(media: str, body: bytes) -> int:
        headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": media}
        return exchange(gateway.ports[0], "POST", path, body, headers).status

    for media in ("application/octet-stream", "application/x-www-form-urlencoded"):
        assert (status(media, b""), status(media, b"grace=1h")) == (200, 415)


def test_who_may(gateway: Governed) -> None:
    for key, status in ((None, 401), ("", 401), ("wrong", 401), (SECRET + "x", 401), (SECRET[:-1], 401)):
        for method, path in (("GET", "/keys"), ("POST", "/keys"), ("GET", "/ledger"), ("GET", "/limits")):
            answer = gateway.ask(method, path, {} if method == "POST" else None, key)
            assert (answer.status, answer.error["code"]) == (status, "invalid_api_key")
    assert gateway.key is not None
    answer = gateway.ask("GET", "/keys", key=gateway.key)
    assert (answer.status, answer.reason, answer.error["type"]) == (
        403,
        "permission_denied",
        "permission_error",
    )
    assert gateway.chat(SECRET).status == 401  # nor the other way round
    headers = {"Authorization": f"Basic {SECRET}"}
    assert exchange(gateway.ports[0], "GET", "/admin/v1/keys", None, headers).status == 401
    assert len(gateway.ask("GET", "/keys").json["data"]) == 1


WRONG: list[tuple[Any, str, str]] = [
    ({"nam": "x"}, "nam", "Did you mean name?"),
    ({"limits": {"dollar_per_day": 5}}, "limits.dollar_per_day", "Did you mean dollars_per_day?"),
    ({"limits": {"dollars_per_day": -1}}, "limits.dollars_per_day", "greater than or equal to 0"),
    ({"routes": ["smal"]}, "routes.0", "Did you mean small?"),
    ({"routes": "small"}, "routes", "tuple"),
    ({"team": "serch"}, "team", "Did you mean search?"),
    ({"team": "none of them"}, "team", "There is search."),
    ({"name": "a\nadmin: the key"}, "name", "cannot be printed"),
    ({"name": "x" * 129}, "name", "128"),
    ({"team": "\x1b[2J"}, "team", "cannot be printed"),
    ({"tags": {"fea ture": "x"}}, "tags.fea ture", "pattern"),
    ({"tags": {"feature": "a\r\nb"}}, "tags.feature", "cannot be printed"),
    ({"expires": "yesterday"}, "expires", "is no duration"),
    ({"expires": "2020-01-01"}, "expires", "not in the future"),
    ({"expires": "9999-12-31"}, "expires", "too far away"),
    ({"expires": "0d"}, "expires", "not in the future"),
    ({"id": "key_mine"}, "id", "unknown key"),
    ({"name": None}, "name", "string"),
    ({"service_class": "urgent"}, "service_class", "'realtime' or 'background'"),
]


def test_what_cannot_be_made(gateway: Governed) -> None:
    for body, param, words in WRONG:
        answer = gateway.ask("POST", "/keys", body)
        assert answer.status == 400, body
        assert answer.error["param"] == param
        assert words in answer.error["message"]
    assert len(gateway.ask("GET", "/keys").json["data"]) == 1  # the first one


def test_requests_that_are_none(gateway: Governed) -> None:
    def status(*request: Any) -> int:
        return gateway.ask(*request).status

    assert status("POST", "/keys", b"[]") == 400
    assert status("POST", "/keys", b'{"name": ') == 400
    assert status("POST", "/keys", b'{"name": "' + b"x" * 70_000 + b'"}') == 413
    assert status("GET", "/keys/key_unknown") == 404
    assert status("POST", "/keys/key_unknown/revoke", {}) == 404
    assert status("POST", "/keys/key_unknown/rotate", {}) == 404
    assert status("POST", "/keys/%27%20or%201%3D1--/revoke", {}) == 404
    assert status("POST", "/keys/key_unknown/revoke", {"why": "x"}) == 400
    assert status("GET", "/keys?limit=0") == 400
    assert status("GET", "/keys?limit=1001") == 400
    assert status("GET", "/keys?limit=1&limit=2") == 400
    assert status("GET", "/keys?teem=x") == 400
    assert status("GET", "/keys?after=nobody") == 404
    assert status("GET", "/keys?team=%ff") == 400
    assert status("GET", "/ledger?after=1.2") == 400
    assert status("GET", "/ledger?after=9999999999999999999.1.w") == 400
    assert status("GET", "/ledger?after=999999999999999999.1.%27") == 200
    assert status("GET", "/ledger?until=9999-12-31") == 400
    assert status("GET", "/ledger?since=0001-01-01") == 400
    assert status("GET", "/ledger?since=sometime") == 400
    assert status("GET", "/ledger?tag=feature") == 400
    assert status("GET", "/limits") == 400
    assert status("DELETE", "/keys") == 405
    assert status("GET", "/nothing") == 404
    assert gateway.ask("GET", "/keys?teem=x").error["message"].endswith("Did you mean team?")


def test_keys_by_the_page(gateway: Governed) -> None:
    made = [gateway.made(name=str(number))["id"] for number in range(5)]
    found, after = [], ""
    while True:
        page = gateway.ask("GET", f"/keys?limit=2{after}").json
        found += [key["id"] for key in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert found[1:] == made  # after the first key
    assert all("value" not in key for key in page["data"])


def test_all_gateways_hear_of_it_within_two_seconds(open_gateway: Open) -> None:
    one, other = open_gateway(), open_gateway()
    made = one.made(name="shared")
    assert [each.chat(made["value"]).status for each in (one, other)] == [200, 200]
    assert other.ask("GET", f"/keys/{made['id']}").json["name"] == "shared"
    assert one.ask("POST", f"/keys/{made['id']}/revoke").status == 200
    until(lambda: other.chat(made["value"]).status == 401)


def test_rows_and_budgets(gateway: Governed, tmp_path: Path) -> None:
    made = gateway.made(name="a", team="search", tags={"feature": "chat"})
    store = Store(f"sqlite:///{tmp_path / 'penstock.db'}")
    store.open()
    store.register("w", "here")
    day = datetime.datetime.now(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    charged = {
        f"key:{made['id']}|dollars|day|{int(day.timestamp())}": NANO,
        f"team:search|dollars|month|{int(day.replace(day=1).timestamp())}": NANO,
        f"tag:feature=chat|device_seconds|day|{int(day.timestamp())}": 90 * NANO,
    }
    entries = [
        Entry(
            number,
            Row(
                id=f"r{number}",
                at=1_800_000_000_000_000_000 + number // 2,
                key_id=made["id"],
                team="search",
                tags={"feature": "chat"},
                dollars=1,
            ),
            charged if number == 0 else {},
        )
        for number in range(5)
    ]
    store.apply("w", entries, Position(), Position(1, 1))
    store.close()

    found, after = [], ""
    while True:
        page = gateway.ask("GET", f"/ledger?limit=2&tag=feature=chat&team=search{after}").json
        found += page["data"]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert [row["id"] for row in found] == ["r4", "r3", "r2", "r1", "r0"]
    assert found[0]["dollars"] == 1e-9
    assert found[0]["feature"] == "chat"
    assert gateway.ask("GET", "/ledger?id=r3").json["data"] == [found[1]]
    assert gateway.ask("GET", "/ledger?key=%27%20or%201=1").json["data"] == []

    limits = {
        each["scope"] + each["unit"]: each
        for each in gateway.ask("GET", f"/limits?key={made['id']}").json["data"]
    }
    own = limits[f"key:{made['id']}dollars"]
    assert (own["cap"], own["used"], own["remaining"]) == (5, 1, 4)
    assert own["resets_at"] == int(day.timestamp()) + 86_400
    team = limits["team:searchdollars"]
    assert (team["window"], team["cap"], team["used"]) == ("month", 50, 1)
    assert limits["tag:feature=chatdevice_seconds"]["remaining"] == 7200 - 90
    rate = limits["team:searchrequests"]
    assert (rate["cap"], rate["used"], rate["resets_at"]) == (100, None, None)
    scopes = {each["scope"] for each in gateway.ask("GET", "/limits?team=search").json["data"]}
    assert scopes == {"team:search"}
    assert gateway.ask("GET", "/limits?key=nobody").status == 404


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with ExitStack() as stack:
        sqlite = f"sqlite:///{tmp_path / 'ledger.db'}"
        found = Store(sqlite if request.param == "sqlite" else stack.enter_context(postgres()))
        found.open()
        yield found
        found.close()


def test_what_is_read_is_the_same_in_both_databases(store: Store) -> None:
    table = KeyStore(store, clock=lambda: 1_800_000_000.0)  # all made in the same moment
    made = sorted(table.create(team="t" if number % 2 else "u")[0].id for number in range(5))
    assert [key.id for key in table.list(limit=2)] == made[:2]
    assert [key.id for key in table.list(after=made[1], limit=9)] == made[2:]
    assert len(table.list(team="t")) == 2
    with pytest.raises(KeyNotFound):
        table.list(after="nobody")

    store.register("w", "here")
    rows = [Row(id=str(number), at=10 + number // 3, key_id="k", tags={"a": "b"}) for number in range(6)]
    charged = {"key:k|dollars|day|0": 7}
    entries = [Entry(number, row, charged if number < 2 else {}) for number, row in enumerate(rows)]
    store.apply("w", entries, Position(), Position(1, 1))
    found, after = [], None
    for _ in range(3):
        page, after = report.page(store, report.Filter(tags=(("a", "b"),)), 2, after)
        found += [row["id"] for row in page]
        assert after is None or report.Place.read(str(after)) == after
    assert (found, after) == (["5", "4", "3", "2", "1", "0"], None)

    limit = Limit("key:k", "dollars", "day", 100)
    store.lease("w", [Ask("key:k|dollars|day|0", limit, start=0, keep=0, need=20, least=20)])
    used, leased = store.booked(["key:k|dollars|day|0", "nobody"])["key:k|dollars|day|0"]
    assert used == 14
    assert 20 <= leased <= 86


@pytest.mark.parametrize(
    ("attempt", "final", "cost", "delta"), [(3, 40, 3, 37), (None, 40, 0, 40), (None, None, 0, None)]
)
def test_how_much_dearer_than_its_attempt(
    store: Store, attempt: int | None, final: int | None, cost: int, delta: int | None
) -> None:
    """One that failed or timed out has cost nothing."""
    store.register("w", "here")
    rows = [
        Row(id="e.attempt", at=1, key_id="k", end="escalated", dollars=attempt),
        Row(id="e", at=1, key_id="k", escalated_from="e.attempt", dollars=final),
        Row(id="plain", at=1, key_id="k", dollars=5),
    ]
    store.apply("w", [Entry(number, row, {}) for number, row in enumerate(rows)], Position(), Position(1, 1))
    said = {
        row["id"]: (row["attempt_dollars"], row["delta_dollars"])
        for row in report.rows(store, report.Filter())
    }
    assert said["e.attempt"] == said["plain"] == (None, None)
    assert said["e"] == (report.decimal(cost), report.decimal(delta))


def test_a_port_of_its_own(open_gateway: Open) -> None:
    gateway = open_gateway(own=", port: 0")
    assert gateway.ask("GET", "/keys").status == 404  # nothing of it is at the public door
    assert gateway.ask("GET", "/keys", port=1).status == 200
    assert gateway.ask("GET", "/keys", key="x", port=1).status == 401
    assert exchange(gateway.ports[1], "POST", CHAT, BODY, {"Authorization": f"Bearer {SECRET}"}).status == 404


def test_metrics_with_a_key_of_their_own(open_gateway: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show dollars. Neither the admin's key nor one for requests is theirs; probes stay open."""
    monkeypatch.setenv("METRICS_KEY", "metrics-0123456789abcdef")
    gateway = open_gateway(own="}, metrics_key_env: METRICS_KEY, hooks: [], files: {")

    def read(path: str, key: str | None) -> Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return exchange(gateway.ports[0], "GET", path, None, headers)

    for key in (None, "", "wrong", SECRET, gateway.key):
        answer = read("/metrics", key)
        assert (answer.status, answer.reason) == (401, "invalid_api_key")
        assert b"penstock:" not in answer.body
    assert b"penstock:gateway_requests_in_flight" in read("/metrics", "metrics-0123456789abcdef").body
    assert read("/readyz", None).status == 200
    assert gateway.chat("metrics-0123456789abcdef").status == 401
    monkeypatch.setenv("METRICS_KEY", "short")
    with pytest.raises(StartupError, match=r"gateway.metrics_key_env: .* METRICS_KEY holds no key of 16"):
        asyncio.run(open_door(loads("gateway: {metrics_key_env: METRICS_KEY}"), None))


def test_it_is_off_unless_wanted() -> None:
    assert admin_secret(loads("gateway: {port: 0}")) is None


@pytest.mark.parametrize("value", [None, "", "short", "ä" * 20, "x" * 10 + "\n" + "x" * 10])
def test_a_secret_that_is_none(value: str | None) -> None:
    spec = loads("gateway: {admin: {key_env: ADMIN_KEY}}")
    with pytest.raises(StartupError, match="environment variable ADMIN_KEY"):
        admin_secret(spec, {} if value is None else {"ADMIN_KEY": value})


def test_no_secret_in_the_spec() -> None:
    with pytest.raises(SpecError, match=r"gateway.admin.key: unknown key. Did you mean key_env\?"):
        loads("gateway: {admin: {key: hunter2, key_env: X}}")


def until(condition: Callable[[], bool]) -> None:
    """Until something is so, in other threads."""
    waited = threading.Event()
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        waited.wait(0.02)
