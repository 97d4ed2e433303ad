"""kill -9 in the middle of a batch: a real server, and a real `run-batch`, ended at several points.

What is asked of both: every line's answer is there once, in the order of the input, and what was answered
before a kill is not asked again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.attack.fuzz.__main__ import tiny

from .server import START_SECONDS, serving

TEXT = "/v1/completions"
LINES = 96
FLAGS = ("--max-model-len", "64", "--kv-cache-memory-bytes", "1MiB", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a model that answers at once."""
    return (*tiny(tmp_path_factory.mktemp("tiny")), *FLAGS, "--batch-concurrency", "2")


def jsonl() -> bytes:
    body = {"prompt": "A Pod is", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    return b"".join(
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": TEXT, "body": body}).encode() + b"\n"
        for i in range(LINES)
    )


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def completed(client: openai.OpenAI, id: str, count: int) -> bool:
    counts = client.batches.retrieve(id).request_counts
    return counts is not None and counts.completed >= count


def written(part: Path, count: int) -> bool:
    return part.exists() and part.read_bytes().count(b"\n") >= count


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def whole(output: bytes) -> list[Any]:
    """The answers, checked: all of them, once, in order."""
    answers = [json.loads(line) for line in output.splitlines()]
    assert [each["custom_id"] for each in answers] == [f"r{i}" for i in range(LINES)]
    assert {each["response"]["status_code"] for each in answers} == {200}
    assert len({each["response"]["body"]["choices"][0]["text"] for each in answers}) == 1
    return answers


@pytest.mark.slow
def test_a_batch_survives_kills_of_its_server(model: tuple[str, ...], tmp_path: Path) -> None:
    flags = (*model, "--batch-dir", str(tmp_path / "batches"))
    id = ""
    for kill_at in (1, LINES // 8):
        with serving(*flags, log=tmp_path / "log") as server:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
                if not id:
                    file = client.files.create(file=("in.jsonl", jsonl()), purpose="batch")
                    id = client.batches.create(
                        input_file_id=file.id, endpoint=TEXT, completion_window="24h"
                    ).id
                eventually(partial(completed, client, id, kill_at))
            engine = server.engine_pid()
            server.process.kill()
            server.process.wait()
            eventually(partial(gone, engine))
    with (
        serving(*flags, log=tmp_path / "log") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
    ):
        eventually(lambda: client.batches.retrieve(id).status == "completed")
        batch = client.batches.retrieve(id)
        assert batch.output_file_id is not None
        answers = whole(client.files.content(batch.output_file_id).read())
    ids = [each["response"]["request_id"] for each in answers]
    assert len(set(ids)) == LINES
    assert batch.usage is not None
    assert batch.usage.output_tokens == 16 * LINES


@pytest.mark.slow
def test_run_batch_goes_on_after_kills(model: tuple[str, ...], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    source.write_bytes(jsonl())
    command = [sys.executable, "-m", "penstock", "run-batch", "--model", *model]
    command += ["-i", str(source), "-o", str(output)]
    kept: dict[bytes, bytes] = {}
    for kill_at in (1, LINES // 8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            eventually(partial(written, part, kill_at))
            process.kill()
        assert not output.exists()
        found = dict(line.split(b" ", 1) for line in part.read_bytes().splitlines() if line.endswith(b"}"))
        assert kept.items() <= found.items()  # answers of before are those of now
        kept = found
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=True)
    assert f"{LINES - len(kept)} answered, 0 with an error, {len(kept)} answered before" in done.stderr
    assert len(whole(output.read_bytes())) == LINES
    final = output.read_bytes().splitlines()
    assert all(final[int(number) - 1] == text for number, text in kept.items())
    assert not part.exists()
