"""Whoever fails, finishes, leaves or is refused: the bills add up to the device's time."""

from __future__ import annotations

import concurrent.futures
import json
import math
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from penstock import assets
from tests.e2e.server import Server, eventually, serving

from .harness import post

BROKEN = 1000
"""A token whose embedding is NaN."""


def damaged(directory: Path) -> Path:
    """The demo model, good but for one token."""
    shutil.copytree(Path(assets.__file__).parent / "demo", directory)
    weights = load_file(directory / "model.safetensors")
    # untied, or the row would be a column of the output layer, too
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][BROKEN] = math.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return directory


def leave(server: Server, body: dict[str, Any]) -> None:
    """Send a request, wait for the first byte of its answer, and go."""
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + data)
        connection.recv(1)


def test_the_bills_of_200_requests_add_up_to_the_devices_time(tmp_path: Path) -> None:
    """Prompts of several chunks, in a small batch with a short queue, so that failing, finishing, leaving and
    being refused meet in the same steps."""
    draws = random.Random(9)

    def prompt(broken: bool) -> list[int]:
        ids = [draws.randrange(300, 900) for _ in range(draws.choice((1, 5, 40, 150)))]
        return [*ids, BROKEN, 7] if broken else ids

    bodies = []
    for _ in range(200):
        prompts = [prompt(draws.random() < 0.15) for _ in range(draws.choice((1, 1, 3, 6)))]
        bodies.append(
            {"prompt": prompts, "n": draws.choice((1, 1, 2)), "max_tokens": draws.choice((1, 2, 8))}
        )
    flags = ("--max-num-seqs", "6", "--max-num-batched-tokens", "64", "--max-num-queued-reqs", "2")
    small = ("--kv-cache-memory-bytes", "16MiB", "--dtype", "float32")
    bills = ("penstock:request_device_seconds_sum", "penstock:request_device_seconds_count")
    with serving(str(damaged(tmp_path / "damaged")), *small, *flags, log=tmp_path / "log") as server:

        def send(number: int) -> int:
            if number % 5 == 4:
                leave(server, bodies[number])
                return 0
            status, body = post(server, "/v1/completions", bodies[number])
            if status == 500:
                assert "logits contain NaN" in json.loads(body)["error"]["message"], body
            return status

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(send, range(len(bodies))))
        eventually(lambda: json.loads(server.get("/load")[1])["server_load"] == 0)
        page = server.metrics()
        billed, count = (page.total(name) for name in bills)
        busy = page.total("penstock:device_seconds_total", state="busy")
    assert set(statuses) == {0, 200, 500, 503}, "every end is among them"
    assert count >= statuses.count(200)
    assert billed == pytest.approx(busy, rel=1e-9)
