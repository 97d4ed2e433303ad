"""`penstock batch`: what becomes of a file of requests when the server, the file or the run is not well."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.batch import Patience, check, run
from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.server.batches.file import Totals

Answer = Callable[[dict[str, Any], int], web.Response]


def lines(*ids: str, **more: Any) -> str:
    return "".join(
        json.dumps(
            {
                "custom_id": each,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": [], "n": index, **more},
            }
        )
        + "\n"
        for index, each in enumerate(ids)
    )


class Server:
    """Answers as it is told; keeps what was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[int] = []
        self.keys: set[str] = set()
        self.most = self.now = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body["n"])
        self.keys.add(request.headers.get("Authorization", ""))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        return self.answer(body, self.asked.count(body["n"]))


def ask(source: Path, output: Path, server: Server, **patience: Any) -> Totals:
    async def no_sleep(_: float) -> None:
        await asyncio.sleep(0)

    async def inside() -> Totals:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            return await run(
                source,
                output,
                f"http://127.0.0.1:{port}",
                {"Authorization": "Bearer key"},
                Patience(**{"sleep": no_sleep, "retries": 2, **patience}),
            )
        finally:
            await runner.cleanup()

    return asyncio.run(inside())


def good(body: dict[str, Any], _: int) -> web.Response:
    return web.json_response({"said": body["n"]})


def answers(output: Path) -> dict[str, Any]:
    read = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({each["custom_id"] for each in read}) == len(read)
    return {each["custom_id"]: each["response"] for each in read}


def test_every_line_has_an_answer(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text(lines(*map(str, range(50))) + "\n")
    server = Server(good)
    totals = ask(source, output, server, concurrency=4)
    assert (totals.answered, totals.failed, totals.unasked) == (50, 0, 0)
    assert answers(output) == {
        str(n): {"status_code": 200, "request_id": "", "body": {"said": n}} for n in range(50)
    }
    assert server.keys == {"Bearer key"}
    assert 1 < server.most <= 4
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl"]


def test_a_refusal_is_an_answer_and_is_asked_once(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(lines("a", "b"))
    server = Server(
        lambda body, _: good(body, 1) if body["n"] else web.json_response({"error": "long"}, status=400)
    )
    totals = ask(source, output, server)
    assert (totals.answered, totals.failed, totals.whole) == (1, 1, True)
    assert answers(output)["a"]["status_code"] == 400
    assert Counter(server.asked) == {0: 1, 1: 1}


def test_what_is_busy_is_asked_again(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(lines("a", "b", "c"))
    server = Server(lambda body, time: good(body, 1) if time > 2 else web.Response(status=429))
    assert ask(source, output, server).answered == 3
    assert Counter(server.asked) == {0: 3, 1: 3, 2: 3}


def test_a_server_that_is_gone_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(lines(*map(str, range(20))))
    down = Server(lambda body, _: good(body, 1) if body["n"] < 7 else web.Response(status=503))
    totals = ask(source, output, down, concurrency=1)
    assert (totals.answered, totals.unasked, totals.whole) == (7, 13, False)
    assert not output.exists(), "nobody takes half of it for all"
    assert max(down.asked) == 7, "the first that is not answered stops all"
    with (tmp_path / "out.part").open("a") as part:
        part.write('{"custom_id": "9", "resp')  # a run that was killed in the middle of a line
    back = Server(good)
    totals = ask(source, output, back)
    assert (totals.before, totals.answered, totals.whole) == (7, 13, True)
    assert sorted(back.asked) == list(range(7, 20))
    assert len(answers(output)) == 20


def test_a_finished_file_is_made_anew(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(lines("a"))
    ask(source, output, Server(good))
    source.write_text(lines("b"))
    assert ask(source, output, Server(good)).answered == 1
    assert set(answers(output)) == {"b"}


def test_a_key_that_is_refused_stops_at_once(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(lines(*map(str, range(30))))
    server = Server(lambda body, _: web.Response(status=401))
    with pytest.raises(BaseExceptionGroup) as caught:
        ask(source, output, server, concurrency=1)
    assert caught.group_contains(StartupError, match="PENSTOCK_API_KEY")
    assert len(server.asked) == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ("{}\n", r":1: .*custom_id"),
        (lines("a", "a"), r":2: .*earlier line has this custom_id"),
        (lines("a", stream=True), r":1: body\.stream"),
        (lines("a").replace("/v1/chat/completions", "/v1/files"), r":1: .*/v1/files.* cannot be asked"),
        (lines("a") + "nonsense\n", r":2: "),
        (lines("a").replace("POST", "GET"), r":1: .*GET"),
    ],
)
def test_a_file_that_cannot_be_asked_is_refused_before_anything_is(
    tmp_path: Path, text: str, message: str
) -> None:
    source = tmp_path / "in"
    source.write_text(text)
    with pytest.raises(StartupError, match=message):
        check(source)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.write_text(lines("a"))
    words = ["batch", str(source), "-o", str(tmp_path / "out"), "--retries", "0"]
    # a port of the loopback device on which nobody listens
    assert main([*words, "--url", "http://127.0.0.1:9/v1"]) == 1
    assert "goes on from there" in capsys.readouterr().err
    assert main([*words, "--url", "ftp://x"]) == 2
    assert main([*words, "--concurrency", "0"]) == 2
    assert main(["batch", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
