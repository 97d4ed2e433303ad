"""Outcomes over HTTP: whose they are, when they come, and what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock.core.errors import InvalidRequest
from penstock.gateway import outcomes as endpoint
from penstock.gateway.ledger.outcomes import MOST_WORDS, Telling, score_text, tell, unknown, words
from penstock.gateway.ledger.rollups import read
from penstock.gateway.ledger.schema import MEASURES, ledger
from penstock.gateway.ledger.store import Entry, Position, Store, StoreDown
from penstock.gateway.outcomes import HEADER, PATH, read_header
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.records import Row
from tests.http.live import PATIENCE, Response, exchange

from .conftest import BODY, CHAT
from .test_admin import SECRET, SPEC, Governed
from .upstream import Upstream

DAY = 86_400 * NANO


class Told(Governed):
    """A gateway whose requests are told the outcomes of."""

    folder: Path

    def post(self, key: str, body: Any, path: str = PATH, **headers: str) -> Response:
        return exchange(self.ports[0], "POST", path, body, {"Authorization": f"Bearer {key}", **headers})

    def asked(self, key: str, **headers: str) -> str:
        """A request; its id."""
        answer = self.post(key, BODY, CHAT, **headers)
        assert answer.status == 200, answer.body
        return answer.headers["x-request-id"]

    def outcome(self, id: str) -> str | None:
        """As the row has it, if it is written."""
        rows = self.ask("GET", f"/ledger?id={id}").json["data"]
        return rows[0]["outcome"] if rows else None


Open = Callable[..., Told]


@pytest.fixture
def open_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setenv("ADMIN_KEY", SECRET)
    monkeypatch.setattr(endpoint, "AGAIN", (0.05,) * 8)
    upstream = Upstream().start()
    opened: list[Told] = []

    def start(window: str = "30d") -> Told:
        spec = SPEC.format(url=upstream.url, folder=tmp_path, own="")
        opened.append(Told(spec.replace("ledger: {", f"ledger: {{outcome_window: {window}, ")))
        return opened[-1]

    yield start
    for each in opened:
        each.stop()
    upstream.stop()


@pytest.fixture
def gateway(open_gateway: Open) -> Told:
    return open_gateway()


def error(answer: Response) -> tuple[int, str]:
    return answer.status, answer.json["error"].get("reason", answer.json["error"]["code"])


def test_the_last_word_counts_and_all_stay(gateway: Told, tmp_path: Path) -> None:
    alice = gateway.made(name="alice", tags={"feature": "chat"})["value"]
    id = gateway.asked(alice)
    answer = gateway.post(alice, {"request_id": id, "outcome": "success"})  # its row is hardly written
    assert answer.json == {
        "object": "outcome",
        "request_id": id,
        "outcome": "success",
        "score": 1.0,
        "changed": True,
        "before": None,
    }
    again = gateway.post(alice, {"request_id": id, "outcome": "success"}).json
    assert (again["changed"], again["before"]) == (False, "success")
    other = gateway.post(alice, {"request_id": id, "score": 0.25}).json
    assert (other["changed"], other["before"], other["score"], other["outcome"]) == (
        True, "success", 0.25, None,
    )  # fmt: skip
    assert gateway.outcome(id) == "0.25"
    store = Store(f"sqlite:///{tmp_path}/penstock.db")
    assert [word["outcome"] for word in words(store, id)] == ["success", "0.25"]
    with store.reading() as connection:
        [(group, sums)] = read(connection, ("feature",)).items()
    found = dict(zip(MEASURES, sums, strict=True))
    assert group == ("chat",)
    assert (found["told"], found["score"], found["requests"]) == (1, NANO // 4, 1)
    assert found["told_dollars"] == found["dollars"] > 0
    store.close()


def test_only_who_asked_and_the_team_can_tell(gateway: Told) -> None:
    alice, bob = (gateway.made(team="search")["value"] for _ in range(2))
    eve = gateway.made()["value"]
    id = gateway.asked(alice)
    assert gateway.post(bob, {"request_id": id, "outcome": "failure"}).status == 200
    theirs = gateway.post(eve, {"request_id": id, "outcome": "success"})
    nobodys = gateway.post(eve, {"request_id": "nobody", "outcome": "success"})
    assert error(theirs) == error(nobodys) == (404, "request_not_found")
    assert theirs.headers["retry-after"] == nobodys.headers["retry-after"] == "2"
    assert theirs.json["error"]["message"].replace(id, "nobody") == nobodys.json["error"]["message"]
    assert gateway.post("sk-ps-wrong", {"request_id": id, "outcome": "success"}).status == 401
    assert gateway.outcome(id) == "failure"


def test_after_the_window_it_is_too_late(open_gateway: Open) -> None:
    gateway = open_gateway("0s")
    alice = gateway.made()["value"]
    id = gateway.asked(alice)
    answer = gateway.post(alice, {"request_id": id, "outcome": "success"})
    assert error(answer) == (409, "outcome_too_late")
    assert "ledger.outcome_window" in answer.json["error"]["message"]
    assert gateway.outcome(id) is None


def test_each_of_a_list_has_its_own_answer(gateway: Told) -> None:
    alice = gateway.made()["value"]
    first, second = gateway.asked(alice), gateway.asked(alice)
    told = [
        {"request_id": first, "outcome": "success"},
        {"request_id": "nobody", "outcome": "success"},
        {"request_id": second, "score": 2},
        "nonsense",
        {"request_id": second, "outcome": "failure"},
        {"request_id": first, "outcome": "failure"},
    ]
    answer = gateway.post(alice, {"outcomes": told})
    assert answer.status == 200
    assert answer.json["counts"] == {"total": 6, "told": 3, "failed": 3}
    data = answer.json["data"]
    assert [each.get("status", 200) for each in data] == [200, 404, 400, 400, 200, 200]
    assert [each["request_id"] for each in data] == [first, "nobody", second, None, second, first]
    assert data[2]["error"]["param"] == "outcomes.2.score"
    assert (data[5]["before"], gateway.outcome(first), gateway.outcome(second)) == (
        "success", "failure", "failure",
    )  # fmt: skip


def test_a_later_request_tells_of_an_earlier_one(gateway: Told) -> None:
    alice = gateway.made()["value"]
    first = gateway.asked(alice)
    second = gateway.asked(alice, **{HEADER: f"{first}=success"})
    gateway.asked(alice, **{HEADER: f"{first}=failure, {second}=0.5, nobody=1"})
    end = time.monotonic() + PATIENCE
    while (gateway.outcome(first), gateway.outcome(second)) != ("failure", "0.5"):
        assert time.monotonic() < end
        time.sleep(0.01)
    refused = gateway.post(alice, BODY, CHAT, **{HEADER: "what"})
    assert refused.status == 400
    assert refused.json["error"]["param"] == HEADER
    assert len(gateway.ask("GET", "/ledger").json["data"]) == 3


def test_another_gateway_may_be_told(open_gateway: Open) -> None:
    here, there = open_gateway(), open_gateway()
    alice = here.made()["value"]
    for _ in range(3):
        id = here.asked(alice)
        assert there.post(alice, {"request_id": id, "outcome": "success"}).status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "request_id"),
        ({"request_id": "a"}, None),
        ({"request_id": "a", "outcome": "success", "score": 1}, None),
        ({"request_id": "a", "outcome": "great"}, "outcome"),
        ({"request_id": "a", "score": -0.1}, "score"),
        ({"request_id": "a", "score": True}, "score"),
        ({"request_id": "a", "score": "1"}, "score"),
        ({"request_id": "", "score": 1}, "request_id"),
        ({"request_id": 7, "score": 1}, "request_id"),
        ({"request_id": "a", "score": 1, "comment": "x"}, "comment"),
        ({"outcomes": []}, "outcomes"),
        ({"outcomes": {}}, "outcomes"),
        ({"outcomes": [{}] * 1001}, "outcomes"),
        ({"outcomes": [], "request_id": "a"}, "request_id"),
    ],
)
def test_what_cannot_be_an_outcome(gateway: Told, body: Any, param: str | None) -> None:
    answer = gateway.post(gateway.made()["value"], body)
    assert answer.status == 400, answer.json
    assert answer.json["error"]["param"] == param


@pytest.mark.parametrize(
    "text", ["", "a", "=success", "a=", "a=2", "a=nan", "a=-1", "a=success,", "a=1," * 9 + "a=1"]
)
def test_headers_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match=HEADER):
        read_header(text)


def test_a_header_in_words() -> None:
    told = read_header("a=b=success, c.1f = 0, d=1,e=0.1234567891")
    assert told == [
        Telling("a=b", "success"), Telling("c.1f ", "0"), Telling("d", "1"), Telling("e", "0.123456789"),
    ]  # fmt: skip


def test_scores_as_they_are_kept() -> None:
    texts = [score_text(Decimal(text)) for text in ("0", "1", "0.5", "1e-12", "0.100", "1e-9")]
    assert texts == ["0", "1", "0.5", "0", "0.1", "0.000000001"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    store.open()
    store.register("w")
    rows = [Row(id=f"r{n}", at=n * DAY, key_id="k", team="t", settlement="settled") for n in range(3)]
    store.apply("w", [Entry(n, row, {}) for n, row in enumerate(rows)], Position(), Position(0, 1))
    yield store
    store.close()


def test_minds_may_be_changed_so_often_and_no_more(store: Store) -> None:
    for turn in range(MOST_WORDS):
        [told] = tell(store, [Telling("r1", f"0.{turn + 1}")], now=DAY, since=0)
        assert told.verdict == "told"
    [told] = tell(store, [Telling("r1", "success")], now=DAY, since=0)
    assert (told.verdict, told.before) == ("too_many", f"0.{MOST_WORDS}")
    assert len(list(words(store, "r1"))) == MOST_WORDS


def test_what_is_late_may_still_be_repeated(store: Store) -> None:
    [first, late] = tell(store, [Telling("r1", "success"), Telling("r0", "success")], now=DAY, since=DAY)
    assert (first.verdict, late.verdict) == ("told", "late")
    [again] = tell(store, [Telling("r1", "success")], now=9 * DAY, since=2 * DAY)
    assert again.verdict == "unchanged"


def test_who_spoke_first_does_not_win_by_being_slow(store: Store) -> None:
    tell(store, [Telling("r1", "failure")], now=DAY + 2, since=0)
    [told] = tell(store, [Telling("r1", "success")], now=DAY + 1, since=0)
    assert (told.verdict, told.before) == ("unchanged", "failure")


def test_an_id_that_stands_twice_is_the_newest(store: Store) -> None:
    twins = [Row(id="r2", at=at, key_id="k", settlement="settled") for at in (DAY, 5 * DAY)]
    entries = [Entry(10 + n, row, {}) for n, row in enumerate(twins)]
    store.apply("w", entries, Position(0, 1), Position(0, 2))
    tell(store, [Telling("r2", "success")], now=6 * DAY, since=0, owner=("k", "t"))
    with store.reading() as connection:
        told = sa.select(ledger.c.at).where(ledger.c.outcome == "success")
        assert connection.execute(told).scalars().all() == [5 * DAY]


def test_nothing_is_half_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(connection: sa.Connection, changes: Any) -> None:
        connection.execute(sa.text("SELECT * FROM nowhere"))

    monkeypatch.setattr(store.rollups, "write", breaks)
    with pytest.raises(StoreDown):
        tell(store, [Telling("r1", "success")], now=DAY, since=0)
    monkeypatch.undo()
    assert list(words(store, "r1")) == []
    [told] = tell(store, [Telling("r1", "success")], now=DAY, since=0)
    assert told.verdict == "told"


def test_what_a_cheaper_attempt_took_belongs_to_the_outcome(store: Store) -> None:
    attempt = Row(
        id="e.attempt", at=DAY, key_id="k", settlement="settled", dollars=3, end="escalated", verdict="failed"
    )
    final = Row(id="e", at=DAY, key_id="k", settlement="settled", dollars=40, escalated_from="e.attempt")
    store.apply("w", [Entry(10, final, {})], Position(0, 1), Position(0, 2))
    assert unknown(store, {"e", "r1"}, ("k", "")) == {"e"}
    store.apply("w", [Entry(11, attempt, {})], Position(0, 2), Position(0, 3))
    assert unknown(store, {"e", "r1"}, ("k", "")) == set()
    for outcome in ("failure", "success"):
        tell(store, [Telling("e", outcome)], now=DAY, since=0, owner=("k", ""))
        with store.reading() as connection:
            sums = dict(zip(MEASURES, read(connection, ())[()], strict=True))
        assert (sums["told"], sums["told_dollars"]) == (1, 43)
        assert sums["score"] == (NANO if outcome == "success" else 0)
        assert (sums["attempts"], sums["attempt_dollars"], sums["escalated_dollars"]) == (1, 3, 40)
    for owner in (("k", ""), None):  # it is no request: who asked told of one success, and not of two
        [told] = tell(store, [Telling("e.attempt", "success")], now=DAY, since=0, owner=owner)
        assert told.verdict == "unknown"
