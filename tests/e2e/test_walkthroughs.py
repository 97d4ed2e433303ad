"""The documents' own walk-throughs, as they stand, on the real engine: curl, SDK, chatbot, load, metrics.

Only what is outside of a text is changed: where the server is. The models that they name are served by the
demo under those names, and metrics that vLLM has renamed since are shown by its own flag for that.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import documents
from .documents import Block
from .server import Page, Server, serving

KINDS = ["documents", "own"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--dtype", "float32", "--kv-cache-memory-bytes", "64MiB", "--max-model-len", "2048"]
    flags += ["--served-model-name", *documents.MODELS, "--show-hidden-metrics-for-version", "0.10"]
    with serving(*flags, log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def chosen(kind: str, own: str, *blocks: Block) -> str:
    """A document's text, or ours."""
    return own if kind == "own" else "".join(block.text() for block in blocks)


def at(server: Server, text: str) -> str:
    """The same with the address of this server."""
    assert any(host in text for host in documents.HOSTS)
    for host in documents.HOSTS:
        text = text.replace(host, server.url)
    return text


def shell(server: Server, text: str) -> str:
    """What a block of commands prints."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    command = ["bash", "-euo", "pipefail", "-c", at(server, text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(server: Server, text: str, folder: Path, said: str = "") -> str:
    """What a script prints; `said` is typed in."""
    (folder / "script.py").write_text(at(server, text))
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, input=said, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def grown(before: Page, after: Page, name: str) -> float:
    return after.total(name) - before.total(name)


@pytest.mark.parametrize(
    "block", [documents.FIRST_CURL, documents.DEMO_CURL, None], ids=["first", "demo", "own"]
)
def test_a_completion_with_curl(server: Server, block: Block | None) -> None:
    answer = json.loads(shell(server, documents.OWN_CURL if block is None else block.text()))
    assert answer["model"] in documents.MODELS
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert 0 < answer["usage"]["completion_tokens"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_openai_sdk(server: Server, tmp_path: Path, kind: str) -> None:
    blocks = (documents.SDK, documents.PREFIX, documents.SECOND_PREFIX)
    before = server.metrics()
    said = python(server, chosen(kind, documents.OWN_SDK, *blocks), tmp_path)
    after = server.metrics()
    assert len(said.strip()) > 20
    # a chat, a stream, three completions; and two questions after one system prompt
    assert grown(before, after, "vllm:request_success_total") == (7 if kind == "documents" else 5)
    assert grown(before, after, "vllm:prefix_cache_hits_total") > 0, "the second question found nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chatbot_that_remembers(server: Server, tmp_path: Path, kind: str) -> None:
    text = chosen(kind, documents.OWN_CHATBOT, documents.CHATBOT)
    before = server.metrics()
    said = python(server, text, tmp_path, "What is a Pod?\nWhat is a Deployment?\nquit\n")
    after = server.metrics()
    assert len(re.findall(r"Assistant: \S", said)) == 2
    assert grown(before, after, "vllm:request_success_total") == 2
    (system,) = re.findall(r'"role": "system", "content": "(.*?)"', text)
    first = [{"role": "system", "content": system}, {"role": "user", "content": "What is a Pod?"}]
    alone = tokens_of(server, first)
    second = grown(before, after, "vllm:prompt_tokens_total") - alone
    other = tokens_of(server, [first[0], {"role": "user", "content": "What is a Deployment?"}])
    assert second > alone + 5, "the second prompt has the first question and its answer"
    assert second > other + 5


def tokens_of(server: Server, messages: list[dict[str, str]]) -> int:
    """Of a prompt, as the server counts them."""
    body = json.dumps({"model": documents.MODELS[0], "messages": messages})
    command = (
        f"curl --silent --fail {documents.HOSTS[0]}/tokenize -H 'Content-Type: application/json' -d '{body}'"
    )
    return int(json.loads(shell(server, command))["count"])


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_requests_at_once(server: Server, tmp_path: Path, kind: str) -> None:
    before = server.metrics()
    said = python(server, chosen(kind, documents.OWN_LOAD_TEST, documents.LOAD_TEST), tmp_path)
    after = server.metrics()
    assert "Total requests: 20\n" in said
    assert float(re.search(r"Throughput: ([\d.]+) req/s", said)[1]) > 0  # type: ignore[index]
    assert float(re.search(r"P99 latency: ([\d.]+)s", said)[1]) > 0  # type: ignore[index]
    assert grown(before, after, "vllm:request_success_total") == 20
    # several requests in a step: what the checklist calls batching behaviour
    steps = grown(before, after, "vllm:iteration_tokens_total_count")
    assert grown(before, after, "vllm:generation_tokens_total") > 2 * steps


@pytest.mark.parametrize("kind", KINDS)
def test_the_grep_for_metrics(server: Server, kind: str) -> None:
    said = shell(server, chosen(kind, documents.OWN_METRICS, documents.METRICS))
    names = set(re.findall(r"^(vllm:\w+)", said, re.MULTILINE))
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting"} <= names
    # renamed since the documents were written, and answered under the old name
    assert {"vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"} <= names
    assert "vllm:time_per_output_token_seconds_bucket" in names
    # gone for ever: gauges of rates, which no flag of vLLM's brings back either; `penstock check` says what
    # to write instead
    assert not names & {"vllm:avg_generation_throughput_toks_per_s", "vllm:avg_prompt_throughput_toks_per_s"}
    assert "vllm:generation_tokens_total" in names


CHECKLIST = Block(
    "004", "  • vLLM server is running on Kubernetes", "  • Load test shows concurrent request handling", {}
)


def test_the_checklist(server: Server) -> None:
    """It runs (here), completes, remembers, shows batching and takes a load at once (the tests above)."""
    status, _ = server.get("/health")
    assert status == 200
    status, models = server.get("/v1/models")
    assert [each["id"] for each in json.loads(models)["data"]] == list(documents.MODELS)


def test_the_checklist_has_five_items() -> None:
    assert CHECKLIST.text().count("•") == 5


def test_hey_sends_no_body_and_is_told_so(server: Server) -> None:
    """`hey -z 60s -c 20 URL` is a GET: it would measure how fast errors are."""
    status, answer = server.get("/v1/chat/completions")
    assert status == 405
    assert "POST" in answer
