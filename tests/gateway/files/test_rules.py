"""What holds for requests holds for the lines of a batch: hooks, houses, tenants; and several gateways."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.gateway.door import Door
from penstock.gateway.files.lines import Lines
from penstock.gateway.files.objects import Kept, Objects
from penstock.gateway.ledger.store import Store
from penstock.gateway.records import Principal
from penstock.gateway.request import Caller
from penstock.gateway.stations import Stations
from penstock.gateway.tracing import Tracing
from penstock.http.form import nameless, read_form
from penstock.spec.load import loads
from penstock.spec.model import Files
from tests.gateway.memory import MemoryKeys, MemoryMeter
from tests.gateway.stores import postgres
from tests.gateway.upstream import Wire, status
from tests.http.live import PATIENCE, exchange

from .cloud import parts
from .conftest import CHAT, SPEC, Gateway, LiveLedger, Make, form, line, lines

USAGE = {"input_tokens": 1000, "output_tokens": 100}


def looks(about: dict[str, Any]) -> dict[str, Any] | None:
    """A hook: refuses one word, and takes another out."""
    text = json.dumps(about["body"])
    assert about["endpoint"] == CHAT
    assert about["body"]["model"] in ("small", "classify")
    if "forbidden" in text:
        return {"refuse": "not here"}
    if "secret" in text:
        body = json.loads(text.replace("secret", "***"))
        return {"body": {**body, "model": "other", "stream": False}, "tags": {"seen": "yes"}}
    return None


def answers(about: dict[str, Any]) -> None:
    """A hook of answers."""


HOOK = "files: {max_bytes: 100000, max_line_bytes: 2000, max_lines: 20}"


def test_hooks_look_at_each_line(make: Make) -> None:
    hook = "hooks: [{when: before, python: 'tests.gateway.files.test_rules:looks', routes: [small]}]"
    gateway = make(replace={HOOK: f"{HOOK}\n  {hook}"})
    refused = gateway.upload(lines(line(1), line(2, user="forbidden")))
    assert (refused.status, refused.reason) == (403, "refused_by_hook")
    assert "Line 2 of the file: Refused: not here" in refused.error["message"]
    assert gateway.cloud.asked == []
    file = gateway.upload(lines(line(1), line(2, user="secret"))).json["id"]
    first, second = (json.loads(each) for each in parts(gateway.cloud.asked[0])["file"][0].splitlines())
    assert "user" not in first["body"]
    assert (second["body"]["user"], second["body"]["model"]) == ("***", "tiny-1")
    assert gateway.batch(file).status == 200
    row = gateway.row()
    assert row["tags"] == {"seen": "yes"}
    assert "rewrote the body" in row["note"]


async def hangs(about: dict[str, Any]) -> None:
    """A hook that hardly answers."""
    await asyncio.sleep(0.4)


def test_hooks_that_are_slow_line_by_line_have_an_end(make: Make) -> None:
    hook = "hooks: [{when: before, python: 'tests.gateway.files.test_rules:hangs'}]"
    gateway = make(replace={HOOK: f"{HOOK[:-1]}, timeout: 1}}\n  {hook}"})
    answer = gateway.upload(lines(*map(line, range(20))))
    assert (answer.status, answer.reason) == (503, "upload_too_slow")
    assert gateway.cloud.asked == []
    assert gateway.upload(b"x", "vision").status == 200


def test_a_route_whose_answers_are_looked_at_has_no_batches(make: Make) -> None:
    hook = "hooks: [{when: after, python: 'tests.gateway.files.test_rules:answers', routes: [small]}]"
    gateway = make(replace={HOOK: f"{HOOK}\n  {hook}"})
    assert gateway.upload(lines(line())).status == 403
    assert gateway.upload(lines(line(model="other"))).status == 200


def test_what_must_not_leave_the_house(make: Make) -> None:
    gateway = make(replace={"narrow: {routes: [other]}": "narrow: {local_only: true}"})
    for content, purpose in ((lines(line()), "batch"), (b"x", "vision")):
        answer = gateway.upload(content, purpose, key=gateway.narrow)
        assert answer.status in (400, 403)
    assert gateway.cloud.asked == []


def test_who_trusts_the_gateway_hears_of_the_tenant(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "sk-gateway")
    gateway = make(
        replace={"kind: openai": "kind: penstock\n    trusts_gateway: true\n    api_key_env: OURS"}
    )
    file = gateway.upload(lines(line())).json["id"]
    assert gateway.batch(file).status == 200
    posted = [each for each in gateway.cloud.asked if each.method == "POST"]
    salt = json.loads(parts(posted[0])["file"][0])["body"]["cache_salt"]
    assert [each.headers["x-penstock-tenant"] for each in posted] == [salt, salt]
    assert posted[0].headers["authorization"] == "Bearer sk-gateway"


def test_a_route_found_by_a_header_takes_any_name(make: Make) -> None:
    gateway = make(replace={"aliases: [classify]": "match: [{headers: {x-tier: low}}]"})
    content = lines(
        *(line(number, model=f"anything-{number}" + "x" * 150 * (number % 2)) for number in range(20))
    )
    answer = gateway.call(
        "POST",
        "/v1/files",
        form(content, purpose="batch"),
        **{"Content-Type": "multipart/form-data; boundary=b", "X-Tier": "low"},
    )
    assert answer.status == 200
    body = {"input_file_id": answer.json["id"], "endpoint": CHAT, "completion_window": "24h"}
    assert gateway.call("POST", "/v1/batches", body).status == 404  # without it these names are none
    assert gateway.call("POST", "/v1/batches", body, **{"X-Tier": "low"}).status == 200


def test_gateways_share_files_and_batches(gateway: Gateway) -> None:
    """Two of them, one ledger: each knows the other's, and one of them settles."""
    file = gateway.upload(lines(line())).json["id"]
    first, second = gateway.live, LiveLedger(gateway.spec)
    gateway.live = second
    gateway.start()
    try:
        name = gateway.batch(file).json["id"]
        gateway.flush()
        gateway.live = first
        assert [each["id"] for each in gateway.call("GET", "/v1/files").json["data"]] == [file]
        assert [each["id"] for each in gateway.call("GET", "/v1/batches").json["data"]] == [name]
        gateway.cloud.end("batch_0001", usage=USAGE)
        gateway.look()
        gateway.live = second
        gateway.look()
        assert gateway.row()["settlement"] == "settled"
        gateway.used()
    finally:
        second.stop()
        gateway.live = first


def test_kill_9_in_the_middle_of_a_batch(gateway: Gateway) -> None:
    """A process that is killed after the upstream has taken a batch, and before it has said so."""
    gateway.live.stop()
    text = textwrap.dedent(SPEC.format(url=gateway.cloud.url, urls=""))
    text = text.replace("gateway:\n", "gateway:\n  port: 0\n")
    ledger = gateway.spec.ledger
    text += f"\nledger: {{url: '{ledger.url}', spool: '{ledger.spool}'}}\n"
    (gateway.folder / "penstock.yaml").write_text(text)
    taken = threading.Event()

    async def never(wire: Wire) -> None:
        gateway.cloud.answer(wire.asked, "/v1/batches")
        taken.set()
        await wire.gone.wait()

    gateway.cloud.script["POST", "/v1/batches"] = never
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "gateway"],
        cwd=gateway.folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        port = int(url.removesuffix("/v1").rpartition(":")[2])
        headers = {"Authorization": f"Bearer {gateway.key}"}
        multipart = {**headers, "Content-Type": "multipart/form-data; boundary=b"}
        body = form(lines(line()), purpose="batch")
        file = exchange(port, "POST", "/v1/files", body, multipart).json["id"]
        given = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        asking = threading.Thread(target=quietly, args=(port, given, headers))
        asking.start()
        assert taken.wait(PATIENCE)
        process.send_signal(signal.SIGKILL)
        asking.join(PATIENCE)
    finally:
        process.kill()
        process.wait(PATIENCE)
        if process.stdout is not None:
            process.stdout.close()
    gateway.cloud.script.clear()
    gateway.live = LiveLedger(gateway.spec)
    gateway.start()
    row = gateway.row()
    assert (row["settlement"], row["end"]) == ("unsettled", "killed")
    assert gateway.used() == row["reserved_dollars"] > 0
    gateway.look()
    (batch,) = gateway.call("GET", "/v1/batches").json["data"]
    assert batch["id"].startswith("batch_0001.")
    gateway.cloud.end("batch_0001", usage=USAGE)
    gateway.look()
    row = gateway.row()
    assert (row["settlement"], row["dollars"], gateway.used()) == ("settled", 600_000, 600_000)


def quietly(port: int, given: Any, headers: dict[str, str]) -> None:
    """Ask, and hear nothing."""
    try:
        exchange(port, "POST", "/v1/batches", given, headers)
    except OSError:
        pass


def test_the_memory_of_an_upload_is_that_of_some_lines(tmp_path: Path) -> None:
    """A form of five MB, made as it is read: held are pieces of 256 KiB."""
    spec = loads(textwrap.dedent(SPEC.format(url="http://127.0.0.1:9", urls="")))
    limits = Files(max_bytes=10**7)
    content = lines(line(1, user="x" * 1600))
    count = 3_000
    empty = form(b"@", purpose="batch").split(b"@")
    pieces = iter([empty[0], *([content * 30] * (count // 30)), empty[1]])
    scope = {"headers": [(b"content-type", b"multipart/form-data; boundary=b")]}

    async def receive() -> dict[str, Any]:
        piece = next(pieces)
        return {"type": "http.request", "body": piece, "more_body": piece is not empty[1]}

    async def upload() -> int:
        door = Door(spec, MemoryKeys({}), MemoryMeter(), Stations(spec, None))
        caller = Caller(Principal(key_id="k"), {}, {}, False)
        read = await read_form(scope, receive, limits.max_bytes, tmp_path)
        with read.file, nameless(tmp_path) as file:
            contents = await Lines(door, caller, "id", limits).rewrite(read.file, file)
            assert contents.lines == count
            size = file.seek(0, os.SEEK_END)
        assert list(tmp_path.iterdir()) == []
        return size

    tracemalloc.start()
    try:
        size = asyncio.run(upload())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 5_000_000
    assert peak < 2_500_000


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        store = Store(f"sqlite:///{tmp_path}/ledger.db")
        store.open()
        yield store
        store.close()
        return
    with postgres() as url:
        store = Store(url)
        store.open()
        yield store
        store.close()


def test_objects_in_either_database(store: Store) -> None:
    objects = Objects(store)
    for number in range(6):
        objects.add(
            Kept(
                replica="ab"[number % 2],
                id=f"x{number}",
                kind="file",
                key_id="k" if number != 3 else "other",
                purpose="p",
                created=number // 3,  # some at the same time
                expires=10 if number == 4 else None,
            )
        )
    everywhere = ["a", "b"]

    def pages(limit: int, **more: Any) -> list[list[str]]:
        found, after, go_on = [], None, True
        while go_on:
            page, go_on = objects.page(
                "file", "k", everywhere, after=after, limit=limit, **{"now": 5, **more}
            )
            found.append([each.id for each in page])
            after = (page[-1].replica, page[-1].id) if page else None
        return found

    assert pages(2) == [["x5", "x4"], ["x1", "x2"], ["x0"]]
    assert pages(3, oldest_first=True) == [["x0", "x2", "x1"], ["x4", "x5"]]
    assert pages(9, now=10) == [["x5", "x1", "x2", "x0"]]
    assert pages(9, purpose="q") == [[]]
    assert objects.page("file", "k", ["a"], after=None, limit=9, now=5)[0][0].id == "x4"
    assert objects.page("file", "k", everywhere, after=("b", "x3"), limit=9, now=5) == ([], False)
    assert objects.page("file", "k", [], after=None, limit=9, now=5) == ([], False)
    objects.add(Kept(replica="a", id="x0", kind="file", key_id="thief", created=9))
    found = objects.find("a", "x0")
    assert found is not None
    assert found.key_id == "k"
    assert objects.change("a", "x0", id="new", state="running", kind="batch", body=b'{"a": 1}')
    assert not objects.change("a", "x0", state="over")
    (due,) = objects.due(50, 60, everywhere, 9)
    assert (due.id, due.body) == ("new", b'{"a": 1}')
    assert objects.due(50, 60, everywhere, 9) == []
    objects.remove("a", "new")
    assert objects.find("a", "new") is None


def test_a_batch_has_a_span_and_files_have_none(gateway: Gateway) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    gateway.live.door.tracing = Tracing(provider)
    file = gateway.upload(lines(line())).json["id"]
    assert gateway.batch(file).status == 200
    gateway.wait_for(lambda: bool(exporter.get_finished_spans()))
    (span,) = exporter.get_finished_spans()
    row = gateway.row()
    assert span.name == "POST /v1/batches"
    assert span.attributes["penstock.request_id"] == row["id"]
    assert span.attributes["model"] == "tiny-1"
    assert span.attributes["http.response.status_code"] == 200
    gateway.cloud.script["POST", "/v1/batches"] = status(500)
    assert gateway.batch(file).status == 502
    gateway.wait_for(lambda: len(exporter.get_finished_spans()) == 2)
    assert exporter.get_finished_spans()[1].attributes["error.type"] == "upstream_status"
