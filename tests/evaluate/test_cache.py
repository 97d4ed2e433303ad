"""Kept answers: one writer, safe from kill -9, and nothing twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.evaluate.answer import Answer
from penstock.evaluate.cache import Cache, key

ABOUT = {"url": "http://x/v1", "model": "m"}


def answer(text: str) -> Answer:
    return Answer(text=text, latency=1, asked_at=2.0, concurrency=8, device_time=3)


def test_what_is_put_is_got_by_the_next_one(tmp_path: Path) -> None:
    name = key("/chat/completions", {"model": "m", "messages": []})
    first = Cache(tmp_path, ABOUT)
    assert first.get(name) is None
    first.put(name, answer("a"))
    first.put(name, answer("b"))
    first.close()
    again = Cache(tmp_path, dict(reversed(ABOUT.items())))
    assert again.get(name) == answer("b")
    again.close()
    other = Cache(tmp_path, ABOUT | {"version": "2"})
    assert other.get(name) is None
    other.close()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_key_is_of_the_content() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 0}
    same = dict(reversed(body.items()))
    assert key("/x", body) == key("/x", same)
    assert (
        len(
            {
                key("/x", body),
                key("/y", body),
                key("/x", body | {"seed": 1}),
                key("/x", body | {"model": "n"}),
            }
        )
        == 4
    )


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    first = Cache(tmp_path, ABOUT)
    with pytest.raises(StartupError, match=r"Another `penstock eval`.*--cache"):
        Cache(tmp_path, ABOUT)
    Cache(tmp_path, {"url": "http://other/v1"}).close()
    first.close()
    Cache(tmp_path, ABOUT).close()


WRITER = """
import sys, pathlib
from penstock.evaluate.cache import Cache
from penstock.evaluate.answer import Answer
cache = Cache(pathlib.Path(sys.argv[1]), {"url": "http://x/v1", "model": "m"})
for number in range(100_000):
    cache.put(str(number), Answer(text=str(number), latency=1, asked_at=0.0, concurrency=1))
    print(number, flush=True)
"""


def test_what_was_reported_survives_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(200)]
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()[:-1]]  # the last may be torn
    process.stdout.close()
    process.wait()
    cache = Cache(tmp_path, ABOUT)
    for number in told:
        kept = cache.get(str(number))
        assert kept is not None
        assert kept.text == str(number)
    cache.close()


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path, ABOUT)
    cache.close()
    for path in tmp_path.iterdir():
        path.write_bytes(b"not a database at all " * 100)
    with pytest.raises(StartupError, match=r"sqlite3 cannot be used.*--cache"):
        Cache(tmp_path, ABOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot be opened"):
        Cache(tmp_path / "file", ABOUT)


def test_a_cache_of_another_version_is_not_touched(tmp_path: Path) -> None:
    cache = Cache(tmp_path, ABOUT)
    cache.close()
    with sqlite3.connect(cache.path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StartupError, match="another version of Penstock"):
        Cache(tmp_path, ABOUT)


def test_a_record_that_cannot_be_read_is_asked_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, ABOUT)
    cache.put("a", answer("x"))
    cache._database.execute("UPDATE answers SET answer = x'00'")
    assert cache.get("a") is None
    cache.put("a", answer("y"))
    assert cache.get("a") == answer("y")
    cache.close()
