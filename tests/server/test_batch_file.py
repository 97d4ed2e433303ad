"""A file of requests on an application of this process: `penstock run-batch`."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from penstock.http.exchange import respond
from penstock.server.app import create_app
from penstock.server.batches.file import Totals, application, run_file
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .fake_engine import FakeEngine
from .tiny import MODEL, REPLY

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(id: str, url: str = TEXT, **body: Any) -> bytes:
    body = {"model": MODEL, "prompt": id, **body}
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def run(app: Any, source: Path, output: Path, concurrency: int = 4) -> Totals:
    return asyncio.run(run_file(application(app), source, output, concurrency=concurrency))


def answers(output: Path) -> list[Any]:
    return [json.loads(each) for each in output.read_bytes().splitlines()]


def test_a_file_is_answered_in_its_order(tokenizer: Tokenizer, says: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    hi = json.dumps(
        {"custom_id": "hi", "url": CHAT, "body": {"messages": [{"role": "user", "content": "Hi"}]}}
    )
    source.write_bytes(
        line("a", max_tokens=50)
        + b"\n{broken\n"
        + line("a")
        + line("bad", temperature=-1)
        + line("elsewhere", url="/v1/nothing")
        + hi.encode()  # the last line has no end
    )
    engine = FakeEngine(says(REPLY))
    config = ServerConfig(served_model_name=(MODEL,))
    app = create_app(engine, tokenizer, ChatTemplate.from_tokenizer(tokenizer), config)
    totals = run(app, source, output)
    assert (totals.answered, totals.failed, totals.before, totals.whole) == (2, 4, 0, True)
    found = answers(output)
    assert [each["custom_id"] for each in found] == ["a", None, "a", "bad", "elsewhere", "hi"]
    assert found[0]["response"]["body"]["choices"][0]["text"] == REPLY
    assert found[5]["response"]["body"]["choices"][0]["message"]["content"] == REPLY
    assert [(each["error"] or {}).get("code") for each in found] == [
        None,
        "invalid_json_line",
        "duplicate_custom_id",
        None,
        "invalid_url",
        None,
    ]
    assert found[3]["response"]["status_code"] == 400
    assert found[1]["error"]["line"] == 3
    assert not (tmp_path / "out.jsonl.part").exists()


class Counting:
    """An application that counts whom it answers; it dies after so many."""

    def __init__(self, dies_after: int = 1 << 30) -> None:
        self.asked: list[str] = []
        self._left = dies_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        await asyncio.sleep(0)
        if self._left == 0:
            await respond(send, b'{"error": {"code": 503, "reason": "engine_dead"}}', status=503)
            return
        self._left -= 1
        self.asked.append(body["prompt"])
        await respond(send, json.dumps({"text": body["prompt"] * 2}).encode())


@given(count=st.integers(1, 12), dies=st.integers(0, 12), cut=st.integers(0, 10**6), places=st.integers(1, 5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_kill_leaves_nothing_is_lost_or_there_twice(
    tmp_path: Path, count: int, dies: int, cut: int, places: int
) -> None:
    source, output, part = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.part"))
    output.unlink(missing_ok=True)
    part.unlink(missing_ok=True)
    source.write_bytes(b"".join(line(str(i)) for i in range(count)))
    first = Counting(dies)
    assert run(first, source, output, places).whole == (dies >= count) == output.exists()
    if not output.exists():
        whole = part.read_bytes()
        part.write_bytes(whole[: cut % (len(whole) + 1)])  # what had reached the disk
        kept = part.read_bytes().count(b"\n")
        second = Counting()
        totals = run(second, source, output, places)
        assert (totals.before, totals.answered) == (kept, count - kept)
        assert len(second.asked) == count - kept
    assert [each["custom_id"] for each in answers(output)] == [str(i) for i in range(count)]
    assert [each["response"]["body"]["text"] for each in answers(output)] == [
        str(i) * 2 for i in range(count)
    ]


def test_the_command_runs_the_demo_model(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "A Pod is", "max_tokens": 4, "temperature": 0}
    source.write_text(
        "".join(json.dumps({"custom_id": str(i), "url": TEXT, "body": body}) + "\n" for i in range(3))
    )
    command = [
        sys.executable,
        "-m",
        "penstock",
        "run-batch",
        "--model",
        "demo",
        "-i",
        str(source),
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"3 answered, 0 with an error", done.stderr)
    texts = {each["response"]["body"]["choices"][0]["text"] for each in answers(output)}
    assert len(texts) == 1
    assert texts != {""}
