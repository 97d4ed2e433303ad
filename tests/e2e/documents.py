"""The walk-throughs of the source documents, as they stand there, and ones of our own that do the same.

The documents are text without the indentation of their code: what is lost is written here, as the depth of
each line that has one. A document that has changed is a test that fails, and not one that passes by.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("PENSTOCK_SHARED", Path(__file__).parents[3] / "shared")) / "sources"
"""Beside a checkout; most have none."""
HOSTS = ("http://localhost:8000", "http://vllm-server:8000")
"""Where the documents' servers are."""
MODELS = ("microsoft/phi-2", "mistralai/Mistral-7B-Instruct-v0.2")
"""What they call their model."""


@dataclass(frozen=True)
class Block:
    """Lines of a document, the first and the last of them in full."""

    document: str
    first: str
    last: str
    depths: Mapping[int, int]
    """Line, from 1 → how deep it is indented; the others are not, or stand in brackets."""
    after: str = ""
    """A line before the first one, where the first one is there more than once."""

    def text(self) -> str:
        """The block, indented. Skips where the documents are not here."""
        if not FOLDER.is_dir():
            pytest.skip("the source documents are not beside this checkout")
        lines = (FOLDER / f"{self.document}.txt").read_text(encoding="utf-8").splitlines()
        begin = lines.index(self.after) + 1 if self.after else 0
        start = lines.index(self.first, begin)
        end = lines.index(self.last, start)
        found = lines[start : end + 1]
        return "".join(f"{'    ' * self.depths.get(n, 0)}{line}\n" for n, line in enumerate(found, 1))


FIRST_CURL = Block("004", "curl http://localhost:8000/v1/completions \\", "}'", {}, after="# Test it")
DEMO_CURL = Block("004", "curl http://localhost:8000/v1/completions \\", "}'", {}, after="# Test completion")
METRICS = Block(
    "004",
    "curl http://localhost:8000/metrics | grep vllm",
    "# - vllm:avg_generation_throughput_toks_per_s",
    {},
)
SDK = Block(
    "004",
    "from openai import OpenAI",
    "responses.append(response.choices[0].text)",
    {27: 1, 28: 2, 38: 1, 43: 1},
)
PREFIX = Block(
    "004",
    "# System prompt is cached and reused",
    ")",
    {},
)
CHATBOT = Block(
    "004",
    "from openai import OpenAI",
    'print(f"\\nAssistant: {assistant_message}\\n")',
    {11: 1, 12: 1, 13: 2, 14: 1, 15: 1, 21: 1, 22: 1, 23: 1},
    after="chatbot.py",
)
LOAD_TEST = Block(
    "004",
    "import asyncio",
    "asyncio.run(main())",
    {5: 1, 6: 1, 14: 2, 15: 1, **dict.fromkeys(range(17, 28), 1), 19: 2, 20: 2, 21: 2},
    after="load_test.py",
)
SECOND_PREFIX = Block(
    "004",
    "response2 = client.chat.completions.create(",
    ")",
    {},
    after="# This makes responses ~30-50% faster",
)

OWN_CURL = """\
curl --silent --fail http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{"model": "microsoft/phi-2", "prompt": "A Pod is", "max_tokens": 16}'
"""
OWN_METRICS = "curl --silent http://localhost:8000/metrics | grep '^vllm:'\n"
OWN_SDK = """\
import openai

client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
ask = {"model": "microsoft/phi-2", "max_tokens": 40, "temperature": 0.7}
rules = "Answer questions about Kubernetes in one sentence, and say where the manual has more about it."


def chat(question: str, **more: object):
    said = [{"role": "system", "content": rules}, {"role": "user", "content": question}]
    return client.chat.completions.create(messages=said, **ask, **more)


print(chat("What is a Node?").choices[0].message.content)
for chunk in chat("What is a Service?", stream=True):
    print(chunk.choices[0].delta.content or "", end="")
texts = [client.completions.create(prompt=text, **ask).choices[0].text for text in ("One", "Two", "Three")]
assert len(texts) == 3
"""
OWN_CHATBOT = """\
import sys

import openai

client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
said = [{"role": "system", "content": "You explain Kubernetes."}]
for line in sys.stdin:
    if line.strip() == "quit":
        break
    said.append({"role": "user", "content": line.strip()})
    answer = client.chat.completions.create(model="microsoft/phi-2", messages=said, max_tokens=60)
    said.append({"role": "assistant", "content": answer.choices[0].message.content})
    print("Assistant:", said[-1]["content"])
"""
OWN_LOAD_TEST = """\
import asyncio
import time

import aiohttp


async def one(session: aiohttp.ClientSession, number: int) -> float:
    began = time.perf_counter()
    body = {"model": "microsoft/phi-2", "prompt": f"Topic {number}:", "max_tokens": 60}
    async with session.post("http://localhost:8000/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.json()
    return time.perf_counter() - began


async def main() -> None:
    began = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        seconds = sorted(await asyncio.gather(*(one(session, number) for number in range(20))))
    print("Total requests:", len(seconds))
    print(f"Throughput: {len(seconds) / (time.perf_counter() - began):.2f} req/s")
    print(f"P99 latency: {seconds[int(0.99 * len(seconds))]:.2f}s")


asyncio.run(main())
"""
