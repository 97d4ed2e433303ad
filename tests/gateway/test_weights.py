"""Weights of routes that are changed while the gateway runs: over the admin API, in all workers, for good."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import InvalidRequest
from penstock.gateway.ledger.store import Store
from penstock.gateway.ledger.weights import WeightTable
from penstock.gateway.policy.routes import Book
from penstock.gateway.policy.weights import Steering, Weight, check, holds, own, weighed
from penstock.spec.load import SpecError, loads
from tests.http.live import PATIENCE, Response, exchange

from .process import Process, gateway
from .stores import postgres
from .upstream import Upstream, status

SECRET = "admin-0123456789abcdef"
SPEC = """
upstreams:
  one: {{url: "{one}", models: {{m: {{}}}}}}
  two: {{url: "{two}", models: {{m: {{name: m-int8}}}}}}
routes:
  chat: {{targets: [{{model: m, upstream: one}}, {{model: m, upstream: two, weight: {weight}}}]}}
  other: {{targets: [{{model: m, upstream: two}}]}}
gateway: {{port: 0, workers: {workers}, admin: {{key_env: ADMIN_KEY}}}}
"""
BODY = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def pair() -> Iterator[tuple[Upstream, Upstream]]:
    one, two = Upstream().start(), Upstream().start()
    yield one, two
    one.stop()
    two.stop()


def spec(pair: tuple[Upstream, Upstream], *, workers: int = 1, weight: float = 0) -> str:
    return SPEC.format(one=pair[0].url, two=pair[1].url, workers=workers, weight=weight)


def admin(process: Process, method: str, path: str, body: Any = None, key: str = SECRET) -> Response:
    return exchange(process.port, method, f"/admin/v1/routes{path}", body, {"Authorization": f"Bearer {key}"})


def weights(one: float, two: float, note: str = "") -> dict[str, Any]:
    return {
        "targets": [
            {"model": "m", "upstream": "one", "weight": one},
            {"model": "m", "upstream": "two", "weight": two},
        ],
        "note": note,
    }


def answered_by(process: Process) -> str:
    return process.post("/v1/chat/completions", BODY).headers["x-penstock-upstream"]


def until_only(process: Process, name: str, in_a_row: int) -> None:
    """Ask until so many answers in a row are one upstream's: every worker has heard of it by then."""
    end, run = time.monotonic() + 3 * PATIENCE, 0
    while run < in_a_row:
        assert time.monotonic() < end
        run = run + 1 if answered_by(process) == name else 0


def test_weights_change_in_all_workers_and_outlast_a_restart(
    tmp_path: Path, pair: tuple[Upstream, Upstream]
) -> None:
    text = spec(pair, workers=2)
    with gateway(tmp_path, text, environment={"ADMIN_KEY": SECRET}) as process:
        assert {answered_by(process) for _ in range(12)} == {"one"}  # weight 0
        shown = admin(process, "GET", "/chat").json
        assert shown["as_in_spec"]
        assert [each["share"] for each in shown["targets"]] == [1, 0]
        said = admin(process, "POST", "/chat/weights", weights(0, 1, "the new one"))
        assert said.status == 200, said.body
        until_only(process, "two", 16)  # of two workers, who share them
        shown = {each["name"]: each for each in admin(process, "GET", "").json["data"]}
        assert not shown["chat"]["as_in_spec"]
        assert shown["chat"]["note"] == "the new one"
        assert shown["other"]["as_in_spec"]
        process.stop()
        key = process.key
    # a restart, from which on it is one process
    with gateway_again(tmp_path, spec(pair)) as process:
        process.key = key
        assert {answered_by(process) for _ in range(6)} == {"two"}
        assert admin(process, "POST", "/chat/weights", {"targets": None}).json["as_in_spec"]
        until_only(process, "one", 6)


def test_a_spec_with_other_weights_ends_what_was_said(
    tmp_path: Path, pair: tuple[Upstream, Upstream]
) -> None:
    with gateway(tmp_path, spec(pair), environment={"ADMIN_KEY": SECRET}) as process:
        assert admin(process, "POST", "/chat/weights", weights(0, 1)).status == 200
        until_only(process, "two", 3)
        process.stop()
        key = process.key
    with gateway_again(tmp_path, spec(pair, weight=1e-9)) as process:
        process.key = key
        assert {answered_by(process) for _ in range(6)} == {"one"}
        assert admin(process, "GET", "/chat").json["as_in_spec"]
        assert "weights that were set for the route 'chat' are void" in process.log


def gateway_again(folder: Path, text: str) -> Any:
    """A gateway on a ledger that has its first key already: it says its address only."""
    return Again(folder, text)


class Again:
    def __init__(self, folder: Path, text: str) -> None:
        self._folder, self._text = folder, text

    def __enter__(self) -> Process:
        self._process = Process(self._folder, self._text, environment={"ADMIN_KEY": SECRET}, says=1)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.close()


def test_traffic_counts_attempts_that_another_target_made_good(
    tmp_path: Path, pair: tuple[Upstream, Upstream]
) -> None:
    pair[1].default = status(500)
    with gateway(tmp_path, spec(pair, weight=1), environment={"ADMIN_KEY": SECRET}) as process:
        answers = [process.post("/v1/chat/completions", BODY).status for _ in range(12)]
        assert set(answers) == {200}  # clients have noticed nothing
        asked = [len(each.asked) for each in pair]
        end = time.monotonic() + PATIENCE
        while (found := admin(process, "GET", "/chat/traffic?since=5m").json)["rows"] < 12:
            assert time.monotonic() < end
        one, two = found["data"]
        assert (one["attempts"], one["failed"], one["timed"]) == (12, 0, 12 - two["attempts"])
        assert (two["attempts"], two["failed"], two["timed"]) == (asked[1], asked[1], 0)
        assert asked[1] > 0
        assert 0 < one["total_seconds"]["p50"] <= one["total_seconds"]["p95"] < 60
        assert two["total_seconds"] is None
        failed = [row["failed"] for row in process.rows() if row["failed"]]
        assert failed == [[["two", "m-int8"]]] * len(failed)


def test_copies_are_no_traffic(tmp_path: Path, pair: tuple[Upstream, Upstream]) -> None:
    text = spec(pair).replace("weight: 0}]}", "weight: 0}], shadow: [{model: m, upstream: two}]}")
    with gateway(tmp_path, text, environment={"ADMIN_KEY": SECRET}) as process:
        for _ in range(3):
            assert answered_by(process) == "one"
        end = time.monotonic() + PATIENCE
        while len(process.rows()) < 6:
            assert time.monotonic() < end
        found = admin(process, "GET", "/chat/traffic").json
        assert [each["attempts"] for each in found["data"]] == [3, 0]


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "says"),
    [
        ("GET", "/nope", None, 404, "There are chat, other"),
        ("POST", "/chat/weights", weights(0, 0), 400, "All weights are 0"),
        ("POST", "/chat/weights", {"targets": weights(1, 1)["targets"][:1]}, 400, "m@two is missing"),
        ("POST", "/chat/weights", {"targets": weights(1, 1)["targets"][:1] * 2}, 400, "twice"),
        ("POST", "/chat/weights", {"targets": [{"model": "x", "weight": 1}]}, 400, "none of them"),
        ("POST", "/chat/weights", weights(1, -1), 400, "greater than or equal to 0"),
        ("POST", "/chat/weights", {"shares": []}, 400, "is required"),
        ("GET", "/chat/traffic?since=yesterday", None, 400, "yesterday"),
    ],
)
def test_what_is_refused(
    gateway_of_two: Process, method: str, path: str, body: Any, code: int, says: str
) -> None:
    answer = admin(gateway_of_two, method, path, body)
    assert answer.status == code
    assert says in json.dumps(answer.json)
    assert admin(gateway_of_two, "GET", "/chat").json["as_in_spec"]


def test_only_who_has_the_admin_key_may(gateway_of_two: Process) -> None:
    assert admin(gateway_of_two, "POST", "/chat/weights", weights(1, 1), key="wrong").status == 401
    assert admin(gateway_of_two, "GET", "", key=gateway_of_two.key).status == 403


@pytest.fixture(scope="module")
def gateway_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    one, two = Upstream().start(), Upstream().start()
    folder = tmp_path_factory.mktemp("weights")
    with gateway(folder, spec((one, two)), environment={"ADMIN_KEY": SECRET}) as process:
        yield process
    one.stop()
    two.stop()


# ---- pure ----

PLAIN = """
upstreams: {a: {url: "http://a", models: {m: {}}}, b: {url: "http://b", models: {m: {}}}}
routes:
  chat:
    aliases: [talk]
    targets: [{model: m, upstream: a, weight: 3}, {model: m, upstream: b}]
    escalate: {verifiers: [{regex: x}], route: far}
  far: {targets: [{model: m, upstream: b}]}
"""


def test_weights_hold_for_every_name_of_a_route() -> None:
    plain = loads(PLAIN)
    ours = own(plain.routes["chat"])
    targets = check("chat", plain.routes["chat"], [Weight("m", "b", 9), Weight("m", "a", 0)])
    assert [each.weight for each in targets] == [0, 9]  # in the route's order
    steering = Steering("chat", targets, ours)
    changed = Book(weighed(plain, [steering]))
    for name in ("chat", "talk"):
        assert [(each.name, each.weight) for each in changed.find(name, {}, {}).targets] == [("b", 9)]
    assert weighed(plain, []) is plain
    other = loads(PLAIN.replace("weight: 3", "weight: 4"))
    assert not holds(other, steering)
    assert weighed(other, [steering]) is other


def test_a_spec_must_leave_somebody_to_ask() -> None:
    with pytest.raises(SpecError, match="all have the weight 0"):
        loads(PLAIN.replace("upstream: b}]}", "upstream: b, weight: 0}]}"))
    with pytest.raises(InvalidRequest, match="All weights are 0"):
        check("far", loads(PLAIN).routes["far"], [Weight("m", "b", 0)])


def test_the_table(database: str) -> None:
    store = Store(database)
    store.open()
    table = WeightTable(store)
    weight = (Weight("m", "a", 3.0), Weight("m", None, 0.0))
    try:
        assert table.read() == (0, [])
        table.put(Steering("chat", weight, weight, 1, "one"))
        table.put(Steering("chat", weight[::-1], weight, 2, "two"))
        assert table.read() == (2, [Steering("chat", weight[::-1], weight, 2, "two")])
        assert store.beat("w").weights == 2
        assert table.drop("chat")
        assert not table.drop("chat")
        assert table.read() == (3, [])
    finally:
        store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
        return
    with postgres() as url:
        yield url
