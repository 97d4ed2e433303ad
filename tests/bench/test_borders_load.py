"""Load, prompts and start-up at their borders: when, what, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import math
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.bench import startup
from penstock.bench.client import open_session
from penstock.bench.errors import BenchError
from penstock.bench.load import Stop, arrival_times, closed_loop, open_loop, stop_after
from penstock.bench.prompts import FIRST_TOKEN_ID, WORDS, Prompt, RandomPrompts, read_jsonl
from penstock.bench.serve import ServeBench
from penstock.bench.startup import StartupBench, StartupTimes, bench_startup, free_port, print_startup

from .fake_server import FakeServer

# ---- arrivals ----


@given(
    count=st.integers(1, 40),
    rate=st.floats(0.01, 1e6),
    burstiness=st.sampled_from([1e-9, 0.5, 1.0, 7.0, math.inf]),
    seed=st.integers(0, 9),
)
def test_the_last_request_is_due_at_the_end_whatever_the_seed(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    times = arrival_times(count, rate, burstiness=burstiness, seed=seed)
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == arrival_times(count, rate, burstiness=burstiness, seed=seed)
    if burstiness == math.inf:
        assert times == pytest.approx([(n + 1) / rate for n in range(count)])


def test_gaps_vary_as_the_burstiness_says() -> None:
    """The spread of a gamma distribution over its mean is 1 / √shape."""
    for shape in (0.25, 1.0, 16.0):
        times = arrival_times(20_000, 1.0, burstiness=shape, seed=3)
        gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
        spread = (sum((gap - 1) ** 2 for gap in gaps) / len(gaps)) ** 0.5
        assert spread == pytest.approx(shape**-0.5, rel=0.1)
    assert arrival_times(5, 1.0, seed=1) != arrival_times(5, 1.0, seed=2)
    assert arrival_times(5, 1.0) == arrival_times(5, 1.0, burstiness=1.0, seed=0)
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]
    assert arrival_times(1, 4.0) == [0.25]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1.0, 1.0), "--num-prompts is 0; it must be at least 1"),
        ((1, 0.0, 1.0), "--request-rate is 0.0; it must be above 0"),
        ((1, -1.0, 1.0), "--request-rate is -1.0"),
        ((1, math.nan, 1.0), "--request-rate is nan"),
        ((1, 1.0, 0.0), "--burstiness is 0.0; it must be above 0"),
        ((1, 1.0, math.nan), "--burstiness is nan"),
    ],
)
def test_loads_that_cannot_be(arguments: tuple[int, float, float], said: str) -> None:
    count, rate, burstiness = arguments
    with pytest.raises(BenchError) as caught:
        arrival_times(count, rate, burstiness=burstiness)
    assert str(caught.value).startswith(said)


# ---- loops ----


class World:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 50.0
        self.slept: list[float] = []
        self.sent: list[tuple[int, float, float]] = []
        self.in_flight = self.most = 0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)  # who was told to go goes before time does
        self.now += seconds

    async def send(self, index: int, intended: float) -> None:
        self.sent.append((index, intended, self.now))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        for _ in range(3):
            await asyncio.sleep(0)
        self.in_flight -= 1


def test_the_open_loop_sends_when_it_is_due_and_late_ones_at_once() -> None:
    world = World()
    arrivals = [1.0, 3.0, 3.0, 2.5]  # the last one is late already
    asyncio.run(open_loop(arrivals, world.send, start=100.0, clock=world.clock, sleep=world.sleep))
    assert world.slept == [51.0, 2.0, 0.0, 0.0]
    assert sorted(world.sent) == [
        (0, 101.0, 101.0),
        (1, 103.0, 103.0),
        (2, 103.0, 103.0),
        (3, 102.5, 103.0),
    ]


@pytest.mark.parametrize(("limit", "most"), [(None, 6), (1, 1), (2, 2), (9, 6)])
def test_the_open_loop_holds_back_what_is_over_the_limit(limit: int | None, most: int) -> None:
    world = World()
    work = open_loop(
        [0.0] * 6, world.send, start=50.0, clock=world.clock, sleep=world.sleep, max_concurrency=limit
    )
    asyncio.run(work)
    assert len(world.sent) == 6
    assert {intended for _, intended, _ in world.sent} == {50.0}
    if limit in (1, 2):
        assert world.most == most
    else:
        assert world.most > 2


@pytest.mark.parametrize(("count", "concurrency", "most"), [(7, 3, 3), (2, 5, 2), (1, 1, 1)])
def test_the_closed_loop_keeps_so_many_in_flight(count: int, concurrency: int, most: int) -> None:
    world = World()
    asyncio.run(closed_loop(count, concurrency, world.send, clock=world.clock))
    assert sorted(index for index, _, _ in world.sent) == list(range(count))
    assert world.most == most
    assert {intended for _, intended, _ in world.sent} == {50.0}


def test_a_stop_cancels_what_runs_and_keeps_its_first_reason() -> None:
    async def scene() -> None:
        stop = Stop()
        assert stop.reason is None
        ended: list[str] = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")

        bound = asyncio.create_task(stop.bound(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stop.set("first")
        stop.set("second")
        await bound
        assert (stop.reason, ended) == ("first", ["cancelled"])

        async def fails() -> None:
            raise BenchError("no")

        async def done() -> None:
            ended.append("done")

        with pytest.raises(BenchError):
            await Stop().bound(fails())
        await Stop().bound(done())
        assert ended == ["cancelled", "done"]

        async with stop_after(calm := Stop(), None):
            pass
        async with stop_after(calm, 1000.0):
            pass
        assert calm.reason is None
        async with stop_after(late := Stop(), 0.0):
            await asyncio.wait_for(late._event.wait(), 20)
        assert late.reason == "max-duration"

    asyncio.run(asyncio.wait_for(scene(), 20))


# ---- what is measured, as it is told ----


def test_a_configuration_is_told_without_secrets_and_infinities(tmp_path: Path) -> None:
    bench = ServeBench("http://h", headers={"B": "secret", "A": "secret"}, dataset_path=tmp_path)
    told = bench.describe()
    assert told["headers"] == ["A", "B"]
    assert told["dataset_path"] == str(tmp_path)
    assert told["request_rate"] == "inf"
    assert (told["num_prompts"], told["burstiness"]) == (1000, 1.0)
    assert ServeBench("http://h").describe()["dataset_path"] is None
    json.dumps(told, allow_nan=False)
    assert "secret" not in repr(bench)


@pytest.mark.parametrize(
    ("rate", "concurrency", "closed"), [(math.inf, 3, True), (math.inf, None, False), (5.0, 3, False)]
)
def test_the_loop_is_closed_where_there_is_nothing_to_wait_for(
    rate: float, concurrency: int | None, closed: bool
) -> None:
    assert ServeBench("http://h", request_rate=rate, max_concurrency=concurrency).closed == closed


# ---- prompts ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"input_len": 0},
            "input length 0, output length 128 and prefix length 0 must be at least 1, 1 and 0",
        ),
        ({"output_len": 0}, "output length 0"),
        ({"prefix_len": -1}, "prefix length -1"),
        ({"range_ratio": -0.1}, "--random-range-ratio is -0.1; it must be in [0, 1)"),
        ({"range_ratio": 1.0}, "--random-range-ratio is 1.0"),
        ({"vocab_size": 1}, "--vocab-size is 1; it must be at least 2"),
    ],
)
def test_prompts_that_cannot_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError) as caught:
        RandomPrompts(**arguments)
    assert said in str(caught.value)


def test_prompts_at_their_smallest_and_by_default() -> None:
    [prompt] = RandomPrompts(1, 1, 0.0, 0, vocab_size=2).draw(1, 0)
    assert (prompt.content, prompt.max_tokens, prompt.input_tokens) == ([1], 1, 1)
    [prompt] = RandomPrompts().draw(1, 0)
    assert (len(prompt.content), prompt.max_tokens) == (1024, 128)
    assert all(FIRST_TOKEN_ID <= int(token) < 1000 for token in prompt.content)  # type: ignore[call-overload]


def test_every_length_in_the_range_is_drawn_and_no_other() -> None:
    source = RandomPrompts(10, 4, range_ratio=0.5, prefix_len=3, vocab_size=300)
    prompts = source.draw(600, 1)
    assert {len(prompt.content) - 3 for prompt in prompts} == set(range(5, 16))
    assert {prompt.max_tokens for prompt in prompts} == {2, 3, 4, 5, 6}
    ids = {token for prompt in prompts for token in prompt.content}
    assert (min(ids), max(ids)) == (FIRST_TOKEN_ID, 299)  # type: ignore[type-var]
    assert len({tuple(prompt.content[:3]) for prompt in prompts}) == 1
    small = RandomPrompts(200, 4, vocab_size=11).draw(5, 1)
    ids = {token for prompt in small for token in prompt.content}
    assert ids == {5, 6, 7, 8, 9, 10}, "half of a vocabulary that has no room for special ones"


def test_words_are_as_many_as_make_up_the_tokens() -> None:
    for tokens, per_word, words in ((30, 1.0, 30), (30, 2.0, 15), (1, 5.0, 1), (7, 2.0, 4)):
        [prompt] = RandomPrompts(tokens, format="text", tokens_per_word=per_word).draw(1, 0)
        assert isinstance(prompt.content, str)
        assert len(prompt.content.split()) == words
        assert set(prompt.content.split()) <= set(WORDS)
        assert prompt.input_tokens is None
    [prompt] = RandomPrompts(1, format="text", prefix_len=0, tokens_per_word=9.0).draw(1, 0)
    assert len(str(prompt.content).split()) == 1


def test_ids_are_no_messages() -> None:
    assert Prompt([1, 2], 3).body(chat=False) == {"prompt": [1, 2], "max_tokens": 3}
    assert Prompt([{"role": "user"}], 3).body(chat=True) == {
        "messages": [{"role": "user"}],
        "max_completion_tokens": 3,
    }


@pytest.mark.parametrize(
    ("row", "chat", "wanted"),
    [
        ({"prompt": "a", "max_tokens": 1, "output_tokens": 9}, False, Prompt("a", 1)),
        ({"prompt": "a"}, True, Prompt("a", 16)),
        ({"prompt": [0, 5], "output_tokens": 2}, False, Prompt([0, 5], 2, 2)),
        ({"messages": [{"a": 1}], "prompt": "x"}, True, Prompt([{"a": 1}], 16)),
    ],
)
def test_lines_that_can_be_read(tmp_path: Path, row: Any, chat: bool, wanted: Prompt) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n\n", encoding="utf-8")
    assert read_jsonl(path, 2, chat=chat, output_len=16) == [wanted] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("5", 'p.jsonl:2: needs a non-empty "prompt" (text or token ids) or "messages"'),
        ("{}", 'p.jsonl:2: needs a non-empty "prompt"'),
        ('{"prompt": []}', 'p.jsonl:2: needs a non-empty "prompt"'),
        ('{"prompt": ["a"]}', 'p.jsonl:2: "prompt" must be text or a list of token ids'),
        (
            '{"prompt": "a", "max_tokens": true}',
            "max_tokens is True; it must be a whole number of at least 1",
        ),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens is 1.5"),
        ('{"prompt": "a", "output_tokens": 0}', "max_tokens is 0"),
        ('{"messages": [{}]}', 'p.jsonl:2: "messages" need --endpoint /v1/chat/completions'),
        ("[", "p.jsonl:2: not JSON ("),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{row}', encoding="utf-8")
    with pytest.raises(BenchError) as caught:
        read_jsonl(path, 1, chat=False, output_len=16)
    assert said in str(caught.value)
    path.write_bytes(b"\xff")
    with pytest.raises(BenchError, match="cannot read --dataset-path"):
        read_jsonl(path, 1, chat=False, output_len=16)


# ---- start-up ----


def test_times_of_starts_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([StartupTimes(1.0, 2.0, 4.0), StartupTimes(3.0, 4.0, 5.0), StartupTimes(2.0, 6.0, 9.0)])
    monkeypatch.setattr(startup, "measure", lambda bench: next(runs))
    seen: list[StartupTimes] = []
    found = bench_startup(StartupBench(("a", "b"), "http://h:1"), seen.append)
    assert len(seen) == found["repeats"] == 3
    assert found["command"] == ["a", "b"]
    assert found["runs"][1] == {"port_open_s": 3.0, "healthy_s": 4.0, "first_token_s": 5.0}
    for phase, low, middle, mean, high in (
        ("port_open_s", 1.0, 2.0, 2.0, 3.0),
        ("healthy_s", 2.0, 4.0, 4.0, 6.0),
        ("first_token_s", 4.0, 5.0, 6.0, 9.0),
    ):
        assert (found[f"min_{phase}"], found[f"median_{phase}"]) == (low, middle)
        assert (found[f"mean_{phase}"], found[f"max_{phase}"]) == (mean, high)
    assert {"date", "machine"} <= set(found)
    out = io.StringIO()
    print_startup(found, Console(file=out, width=100))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip(" ─━╴╶")]
    assert lines == [
        ["Start-up:", "seconds", "from", "exec"],
        ["run", "port", "open", "healthy", "first", "token"],
        ["1", "1.000", "2.000", "4.000"],
        ["2", "3.000", "4.000", "5.000"],
        ["3", "2.000", "6.000", "9.000"],
        ["median", "2.000", "4.000", "5.000"],
    ]
    with pytest.raises(BenchError, match="--repeats is 0; it must be at least 1"):
        bench_startup(StartupBench(("a",), "http://h:1", repeats=0))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:1", ("h", 1)),
        ("http://h", ("h", 80)),
        ("https://h", ("h", 443)),
        ("https://h:8", ("h", 8)),
        ("http://:9", ("127.0.0.1", 9)),
    ],
)
def test_where_a_server_will_listen(url: str, address: tuple[str, int]) -> None:
    assert startup._address(url) == address


def test_a_port_is_open_where_somebody_listens() -> None:
    port = free_port()
    assert 1024 <= port < 65536
    assert not startup._port_open("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert startup._port_open("127.0.0.1", taken.getsockname()[1])


def test_the_last_fifteen_lines_are_told() -> None:
    code = "import sys; print('\\n'.join(map(str, range(40)))); sys.exit(3)"
    bench = StartupBench(
        (sys.executable, "-S", "-E", "-c", code), f"http://127.0.0.1:{free_port()}", repeats=1
    )
    with pytest.raises(BenchError) as caught:
        bench_startup(bench)
    said = str(caught.value)
    assert "the server ended with status 3 after " in said
    assert said.endswith("; its last output:\n" + "\n".join(map(str, range(25, 40))))
    silent = StartupBench((sys.executable, "-S", "-E", "-c", ""), bench.base_url, repeats=1)
    with pytest.raises(BenchError, match=r"ended with status 0 .*; it printed nothing$"):
        bench_startup(silent)


def test_the_first_request_is_short_and_greedy() -> None:
    with FakeServer().running() as server:
        bench = StartupBench(("x",), server.url, headers={"X-A": "1"})
        started = time.perf_counter()
        process: Any = SimpleNamespace(poll=lambda: None)
        host, port = startup._address(server.url)
        with tempfile.TemporaryFile() as output:
            watch = startup._Watch(bench, process, output, started)
            found = asyncio.run(asyncio.wait_for(watch.times(host, port), 20))
    assert 0 <= found.port_open_s <= found.healthy_s <= found.first_token_s <= time.perf_counter() - started
    [request] = server.requests
    assert (request["prompt"], request["max_tokens"]) == ("What is a Pod?", 2)
    assert (request["temperature"], request["model"], request["stream"]) == (0, "fake-model", True)
    assert server.headers[0]["X-A"] == "1"


def test_a_server_has_a_session_and_no_input_of_its_callers() -> None:
    code = "import os, sys; print(repr(sys.stdin.read()), os.getsid(0) == os.getpid())"
    bench = StartupBench((sys.executable, "-S", "-E", "-c", code), "http://127.0.0.1:1")
    with tempfile.TemporaryFile() as output:
        with startup._server(bench, output) as process:
            assert process.wait(20) == 0
        output.seek(0)
        assert output.read() == b"'' True\n"
    with (
        pytest.raises(BenchError, match="cannot run '/nowhere': "),
        tempfile.TemporaryFile() as output,
        startup._server(StartupBench(("/nowhere",), "http://h"), output),
    ):
        pass


def test_a_server_is_healthy_when_it_says_so() -> None:
    async def scene() -> None:
        async with open_session() as session:
            assert not await startup._healthy(session, f"http://127.0.0.1:{free_port()}")
            with FakeServer().running() as server:
                assert await startup._healthy(session, server.url)
                assert not await startup._healthy(session, f"{server.url}/nowhere")

    asyncio.run(scene())


def test_the_command_of_our_own_server() -> None:
    assert startup.serve_command("m", ["--a", "1"], 5) == (
        *(sys.executable, "-m", "penstock", "serve", "m"),
        *("--host", "127.0.0.1", "--port", "5", "--a", "1"),
    )
