"""The measurement of a start: how often it looks, what it shows of the output, what the server reads."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest

from penstock.bench import startup
from penstock.bench.startup import StartupBench, _server, _Watch


def watch(output: bytes = b"") -> _Watch:
    made = _Watch.__new__(_Watch)
    made._output = io.BytesIO(output)
    made._started = time.perf_counter()
    made._process = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    made._bench = StartupBench(["none"], "http://h")
    return made


@pytest.mark.parametrize(
    ("output", "tail"),
    [
        (b"", "; it printed nothing"),
        (b" \n\n", "; it printed nothing"),
        (b"  a\nb \n\n", "; its last output:\n  a\nb"),
        (b"\xff\n", "; its last output:\n\ufffd"),
        (
            b"".join(b"%d\n" % n for n in range(20)),
            "; its last output:\n" + "\n".join(map(str, range(5, 20))),
        ),
    ],
)
def test_the_last_lines_of_the_output(output: bytes, tail: str) -> None:
    assert watch(output)._tail() == tail


def test_between_two_looks_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    looks = iter([False, False, True])

    async def sleep(seconds: float) -> None:
        naps.append(seconds)

    async def ready() -> bool:
        return next(looks)

    monkeypatch.setattr(startup, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    asyncio.run(watch()._until(ready, "to listen"))
    assert naps == [startup.POLL_S] * 2


def test_the_server_reads_nothing_and_what_it_prints_is_kept() -> None:
    code = (
        "import os, sys; print(repr(sys.stdin.read()), os.getsid(0) == os.getpid()); "
        "print('e', file=sys.stderr)"
    )
    with tempfile.TemporaryFile() as output, pytest.MonkeyPatch.context() as patch:
        real = subprocess.Popen
        inputs: list[object] = []

        def started(*args: object, **fields: object) -> object:
            inputs.append(fields["stdin"])
            return real(*args, **fields)  # type: ignore[call-overload]

        patch.setattr(startup.subprocess, "Popen", started)
        with _server(StartupBench([sys.executable, "-c", code], "http://h"), output) as process:
            assert process.wait(30) == 0
        output.seek(0)
        assert sorted(output.read().split(b"\n")) == [b"", b"'' True", b"e"]
        assert inputs == [subprocess.DEVNULL]
